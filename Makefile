# `make demo` and `make test` each set themselves up on a fresh machine (Python 3.11+, a C++17 compiler).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-out
# rebuilt when what is compiled or pinned changes; Python sources are used in place
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: help demo docs test slow lint sanitize clang portable compat sweep fuzz kills mutants benchmark serve-check study clean

help:
	@echo "make demo       quantize the small model that ships with gemq and generate from it"
	@echo "make test       linters and the test suite"
	@echo "make slow       the rest of the suite, about 10 minutes: every kernel variant for sm_90, archives, larger jobs"
	@echo "make lint       linters alone"
	@echo "make docs       the documentation as a site, build/site/index.html"
	@echo "make sanitize   the C++ core's tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make clang      the same tests on a build by Clang (needs clang++)"
	@echo "make portable   the same tests on the kernels as ARM runs them (needs a cross compiler and qemu-user)"
	@echo "make compat     the suite on the declared torch, triton and transformers (SETS=triton-3.6.0: others)"
	@echo "make sweep      20,000 op calls drawn from seeds, against float64 (CASES=, FIRST=)"
	@echo "make fuzz       mutated checkpoints for SECONDS=600: the saved weights, or one clear error"
	@echo "make kills      ends gemq quantize at every write and rename and at 100 random moments; each must resume alike"
	@echo "make mutants    plants faults one at a time; at least one test must fail for each (KIND=python or compiled)"
	@echo "make benchmark  CPU (and, with a GPU, GPU) benchmarks"
	@echo "make serve-check  the real vLLM on a CPU against gemq's own models; installs it into FOLDER=build/serve (4 GB)"
	@echo "make study      the accuracy study; resumable (TABLE=1,21 MODELS=folder DATA='--text a=held.txt' STUDY=study-out)"
	@echo "make clean      remove the virtual environment and what was built"

# pip alone reads constraints.txt: torch is pinned first so that nothing pulls another build of it
$(VENV)/.installed: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch scikit-build-core pybind11 cmake ninja
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,docs]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/gemq demo --output $(OUT)

# reads the installed packages only: no network, no theme or font from elsewhere
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# a file's tests share what they make; two processes are what two cores take
WORKERS ?= 2
test: lint
	$(BIN)/pytest tests -q -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable

slow: $(VENV)/.installed
	$(BIN)/pytest tests -q -m slow -n $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable

# a build of its own (libstdc++ is named so that the sanitizer finds the function that throws), loaded in place of the installed extension by tests/run_build.py
SANITIZERS := address,undefined
sanitize: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DGEMQ_CUDA=OFF \
	  -DGEMQ_SANITIZE=$(SANITIZERS) -DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize
	GEMQ_SANITIZE=$(SANITIZERS) LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(BIN)/python tests/run_build.py build/sanitize

# Debian: clang, libomp-dev
CLANG ?= clang++
clang: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/clang -G Ninja -DCMAKE_BUILD_TYPE=Release -DGEMQ_CUDA=OFF -DCMAKE_CXX_COMPILER=$(CLANG) \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/clang
	$(BIN)/python tests/run_build.py build/clang

# Debian: g++-aarch64-linux-gnu, qemu-user
PORTABLE_CXX ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64
portable: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python tests/run_portable.py --compiler "$(PORTABLE_CXX)" --emulator "$(EMULATOR)"

# the declared versions; SETS= takes parts of other sets' names
SETS ?=
compat: $(VENV)/.installed
	$(BIN)/python tests/compat.py --only $(SETS) --json build/compat.json

CASES ?= 20000
ROUNDS ?= 5
FIRST ?= 0
sweep: $(VENV)/.installed
	GEMQ_SWEEP_CASES=$(CASES) GEMQ_SWEEP_FIRST=$(FIRST) GEMQ_SWEEP_INTERPRETED=$$(( $(CASES) / 50 )) \
	  $(BIN)/pytest tests/test_op_sweep.py -q
	for i in $$(seq $(ROUNDS)); do GEMQ_NEW_EXAMPLES=1 $(BIN)/pytest -q tests/test_core_properties.py \
	  tests/test_core_bits.py tests/test_fuzz_checkpoint.py tests/test_pack_emulated.py || exit 1; done

SECONDS ?= 600
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz_checkpoint.py --seconds $(SECONDS)

KILLS ?= all
RANDOM ?= 100
kills: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/engine_kills.py --events $(KILLS) --random $(RANDOM)

KIND ?= all
mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py --kind $(KIND)

benchmark: $(VENV)/.installed
	$(BIN)/pytest --benchmark-only

# WAYS=, FAMILIES=, DTYPES= choose parts
FOLDER ?= build/serve
serve-check: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/serve_check.py $(FOLDER) $(if $(WAYS),--ways $(WAYS)) \
	  $(if $(FAMILIES),--families $(FAMILIES)) $(if $(DTYPES),--dtypes $(DTYPES))

TABLE ?= all
STUDY ?= study-out
study: $(VENV)/.installed
	$(BIN)/python benchmarks/accuracy/study.py $(MODELS) $(DATA) --table $(TABLE) --out $(STUDY)

clean:
	rm -rf $(VENV) build demo-out
