"""gemq: quantize the experts of Mixture-of-Experts language models globally, and run them packed."""

__version__ = "0.1.0"
