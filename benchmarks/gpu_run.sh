#!/usr/bin/env bash
# What is worth knowing from a GPU machine, most valuable first; a cut-off run keeps what it has.
#
#   WHEELS=.whl OUT=out bash benchmarks/gpu_run.sh
#
# Needs: python with torch, triton, pytest, pybind11, scikit-build-core, cmake, ninja; nvcc. No network: wheels that
# are missing lie in $WHEELS. Leaves JSON and logs in $OUT, and in $OUT/steps.json each step's exit code and seconds.
set -u

cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-./out}
WHEELS=${WHEELS:-.whl}
PYTHON=${PYTHON:-python3}
SITE=${SITE:-/tmp/site}
BUILT=${BUILT:-/tmp/gemq-built}
mkdir -p "$OUT" "$SITE" "$BUILT"
OUT=$(cd "$OUT" && pwd)
STEPS="$OUT/steps.json"
ROWS=()

# step NAME SECONDS COMMAND...: run it under a limit, keep its log, and record how it ended
step() {
  local name=$1 limit=$2 begin rc
  shift 2
  begin=$(date +%s)
  echo "== $name" >&2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  ROWS+=("{\"step\": \"$name\", \"rc\": $rc, \"seconds\": $(($(date +%s) - begin))}")
  local IFS=,
  printf '[%s]\n' "${ROWS[*]}" >"$STEPS"
  tail -n 12 "$OUT/$name.log" >&2
  return "$rc"
}

# the checkout's own python/ and triton_kernels/, without an extension: enough for the kernels
PLAIN=$(mktemp -d)
mkdir -p "$PLAIN/gemq"
for entry in python/gemq/*; do
  ln -sfn "$PWD/$entry" "$PLAIN/gemq/$(basename "$entry")"
done
ln -sfn "$PWD/triton_kernels" "$PLAIN/gemq/triton_kernels"
# the project's own settings turn warnings of versions not met before into errors, and need pytest-timeout
printf '[pytest]\nmarkers =\n  gpu: needs an NVIDIA GPU\n  slow: takes more than 20 seconds\npythonpath = %s\n' \
  "$PWD/tests $PWD/benchmarks" >"$PLAIN/pytest.ini"
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -c "$PLAIN/pytest.ini" --rootdir . -m "gpu or not slow")

step device 170 env PYTHONPATH="$PLAIN" "$PYTHON" benchmarks/gpu_subnormals.py --json "$OUT/device.json"
COPY=$("$PYTHON" -c "import json; print(json.load(open('$OUT/device.json'))['copy_gb_s'])" 2>/dev/null || echo 3000)

shopt -s nullglob
WHEEL_FILES=("$WHEELS"/*.whl)
if ((${#WHEEL_FILES[@]})); then
  step wheels 120 "$PYTHON" -m pip install --no-index --no-deps --upgrade --target "$SITE" "${WHEEL_FILES[@]}"
fi

step mixtral_first 170 env PYTHONPATH="$PLAIN:$SITE" "$PYTHON" benchmarks/gpu_mixtral_block.py \
  --copy-gb-s "$COPY" --tokens 1 --mixes 2.0 2.5 --json "$OUT/mixtral_first.json"

step build 400 env PYTHONPATH="$SITE" "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index \
  --upgrade --target "$BUILT" .
RUN_PATH="$BUILT:$SITE"
if [[ ! -d "$BUILT/gemq" ]]; then
  RUN_PATH="$PLAIN:$SITE"
fi

step triton_tests 420 env PYTHONPATH="$RUN_PATH" "${PYTEST[@]}" \
  --junitxml="$OUT/triton_tests.xml" tests/test_triton_gpu.py tests/test_triton_prefill_gpu.py

step mixtral 400 env PYTHONPATH="$RUN_PATH" "$PYTHON" benchmarks/gpu_mixtral_block.py \
  --copy-gb-s "$COPY" --json "$OUT/mixtral.json"

step sweep 400 env PYTHONPATH="$RUN_PATH" "$PYTHON" benchmarks/gpu_mixtral_block.py \
  --copy-gb-s "$COPY" --sweep --json "$OUT/sweep.json"

CORE_TESTS=(tests/test_core*.py tests/test_ops*.py tests/test_triton_kernels.py)
step core_tests 420 env PYTHONPATH="$RUN_PATH" "${PYTEST[@]}" \
  --junitxml="$OUT/core_tests.xml" "${CORE_TESTS[@]}"

step sass 200 env PYTHONPATH="$RUN_PATH" "$PYTHON" benchmarks/sass_report.py --quick --json "$OUT/sass.json"

BENCHES=(benchmarks/bench_*.py)
if ((${#BENCHES[@]})); then
  step benchmarks 400 env PYTHONPATH="$RUN_PATH" "${PYTEST[@]}" --benchmark-only \
    --benchmark-json="$OUT/benchmarks.json" "${BENCHES[@]}"
fi

rm -rf "$PLAIN"
cat "$STEPS"
