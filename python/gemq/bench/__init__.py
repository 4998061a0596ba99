"""``gemq bench``: decoding speed and memory of real architectures with random weights."""

from gemq.bench.architectures import PUBLISHED
from gemq.bench.run import BenchConfig, BenchResult, run_bench, write_json

__all__ = ["PUBLISHED", "BenchConfig", "BenchResult", "run_bench", "write_json"]
