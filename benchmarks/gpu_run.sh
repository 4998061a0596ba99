#!/usr/bin/env bash
# Everything worth knowing from a GPU machine in one call, most valuable first, within a number of seconds.
#
#   bash benchmarks/gpu_run.sh [--budget 540] [--out DIR] [--wheels DIR] [--stages a,b=SECONDS] [--commit HASH] [--dry-run]
#
# All of `gemq bench` with its 16-bit baselines in one call: --stages 'wheels,build,bench_*'. gpu.json then has "speedups".
# Needs python3 with torch, triton, transformers, pytest, pytest-benchmark, pybind11, scikit-build-core, cmake, ninja,
# and nvcc. No network: wheels of what is missing (mip, highsbox, cbcbox, ...) lie in --wheels. Leaves gpu.json, gpu.log
# and tuned.json in --out (default $OUT, else ./out). Where there is no GPU every stage says so and the exit code is 0.
set -euo pipefail

cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -u benchmarks/gpu_stages.py --default-out "${OUT:-./out}" "$@"
