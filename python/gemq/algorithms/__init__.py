"""The method: calibration, importance, allocation, GPTQ, router tuning and their progression."""
