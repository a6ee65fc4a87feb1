# Commands that do everything, set-up included: `make demo`, `make test-quick`, `make test`.
# On a machine with Hopper GPUs: `make test-gpu`, `make test-gpu-sanitize`; docs/verification.md.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# Without byte code, which Python makes of what is imported: compiling all of torch takes longer than the demo.
PIP    := $(PY) -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
# Python then keeps the byte code of what it does import, whatever the surroundings say: without it each of the
# many processes that tests start compiles torch's modules anew, 3 s instead of 1.5.
export PYTHONDONTWRITEBYTECODE :=

# What is installed is noted in files: the packages to build with; what the demo needs; what the quick tests
# need; all of it. They are out of date without an environment.
TOOLS := build/.tools
DEMO  := build/.demo
QUICK := build/.quick
BUILT := build/.installed
ifeq ($(wildcard $(PY)),)
  $(shell rm -f $(TOOLS) $(DEMO) $(QUICK) $(BUILT))
endif

PROJECT := setup.py pyproject.toml constraints.txt
CORE    := $(shell find csrc/layout csrc/bindings/core.cpp -type f) $(PROJECT)
SOURCES := $(shell find csrc -type f) $(PROJECT)

# Kernels are left out where there is no GPU, and the emulator, unless they were built before.
LEAVE_OUT = $(if $(shell nvidia-smi -L 2>/dev/null)$(wildcard deepep/_cuda*.so),,DEEPEP_CUDA=0) \
            $(if $(wildcard deepep/_emulator*.so),,DEEPEP_EMULATOR=0)

# $(call set_up,EXTRA,WHAT TO LEAVE OUT): pip unpacks torch while the compiler runs, and finds its objects.
define set_up
@$(PIP) -r constraints.txt & packages=$$!; status=0; \
  env $(2) $(PY) setup.py -q build_ext --inplace || status=1; \
  wait $$packages || status=1; exit $$status
@echo "== deepep and the other packages of '$(1)'"
@env $(2) $(PIP) --no-build-isolation -e '.[$(1)]'
endef

# NVSHMEM's libraries, 60 MB: tests run its IBRC transport over csrc/loopverbs.
EVERYTHING := test,wire

.NOTPARALLEL:
.PHONY: all install demo test test-quick check-style check-types test-emulator unit format clean
.PHONY: test-gpu test-gpu-sanitize test-cluster dist figures
all: install
install: $(BUILT)

$(TOOLS): pyproject.toml
	@echo "== a Python environment in $(VENV)"
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) $$(sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@mkdir -p build && touch $@

$(DEMO): $(CORE) | $(TOOLS)
	@echo "== torch, and the layout rules compiled"
	$(call set_up,cli,$(LEAVE_OUT))
	@touch $@

$(QUICK): $(CORE) | $(TOOLS)
	@echo "== torch, and the layout rules compiled"
	$(call set_up,test,$(LEAVE_OUT))
	@touch $(DEMO) $@

$(BUILT): $(SOURCES) | $(TOOLS)
	@echo "== torch, and everything compiled: layout rules, emulator and, where nvcc is, kernels; minutes"
	$(call set_up,$(EVERYTHING),)
	@touch $(DEMO) $(QUICK) $@

demo: $(DEMO)
	@echo "== the demo"
	@$(PY) -m deepep demo --ranks 4 --out demo-output

test: install check-style check-types test-emulator unit

# A part that says within two minutes whether something obvious broke: style, the house's rules, the layout
# rules against the oracle, the oracle by itself, Buffer against it on one to four ranks, cases and the
# command line. Needs neither the emulator nor nvcc.
QUICK_TESTS := tests/house tests/test_package.py tests/layout tests/sim/cases/test_cases.py \
  $(addprefix tests/reference/test_, layout.py high_throughput.py low_latency.py formats.py logfmt.py) \
  $(addprefix tests/api/test_, config.py signatures.py high_throughput.py low_latency.py) \
  tests/cli/test_terminal.py
test-quick: $(QUICK) check-style
	$(PY) -m pytest -q -m "not slow" $(QUICK_TESTS)

check-style: | $(QUICK)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The package as users import it, laid out by links, because mypy does not follow package_dir.
check-types: | $(QUICK)
	rm -rf build/types && mkdir -p build/types/deepep
	ln -s $(CURDIR)/deepep/* build/types/deepep/
	ln -s $(CURDIR)/reference build/types/deepep/reference
	ln -s $(CURDIR)/sim build/types/deepep/sim
	cd build/types && ../../$(PY) -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p deepep

# Several tests at a time; those that measure how long ranks wait for each other, with nothing beside them that
# computes: they mostly wait.
TEST_JOBS ?= 3
WAITING_JOBS ?= 4
SIDE_BY_SIDE := -n $(TEST_JOBS) --dist worksteal
WAITING := -n $(WAITING_JOBS) --dist worksteal
# The files that have some, so that not every process of pytest's imports all the others.
WAITING_FILES := $(shell grep -rl --include='test_*.py' 'mark\.alone' tests)

# Buffer's own tests, on the kernels' source: those that DEEPEP_BACKEND makes others than they are in `unit`.
test-emulator: install
	DEEPEP_BACKEND=emulator $(PY) -m pytest -q $(SIDE_BY_SIDE) -m "not alone and not own_backend" tests/api
	DEEPEP_BACKEND=emulator $(PY) -m pytest -q $(WAITING) -m "alone and not own_backend" $(filter tests/api/%,$(WAITING_FILES))

unit: install
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "not alone"
	$(PY) -m pytest $(WAITING) -m alone $(WAITING_FILES)

# The Python to test GPUs with: this checkout's own, or one in which deepep, pytest and cloudpickle are installed.
GPU_PY ?= $(PY)
GPU_INSTALLED := $(if $(filter $(PY),$(GPU_PY)),install)
GPU_TESTS ?= tests/backends/cuda tests/collectives tests/reference tests/cli/test_bench.py
SANITIZED := small_shapes or num_worst or masked or too_many or test_layout
SANITIZED_LOW_LATENCY := test_formats or between_ranks or number_of_blocks or depend_on_blocks
SANITIZED_RING := drawn_sends or is_silent

test-gpu: $(GPU_INSTALLED)
	NCCL_NVLS_ENABLE=0 $(GPU_PY) -m pytest -m gpu --durations=10 $(GPU_TESTS)

test-gpu-sanitize: $(GPU_INSTALLED)
	@set -e; for tool in memcheck racecheck synccheck; do \
	  echo "== $$tool"; \
	  compute-sanitizer --tool $$tool --error-exitcode 9 --target-processes all \
	    $(GPU_PY) -m pytest -q tests/backends/cuda/test_virtual_ranks.py tests/backends/cuda/test_low_latency.py \
	    tests/backends/cuda/test_low_latency_far.py tests/backends/cuda/test_ring.py \
	    -k "$(SANITIZED) or $(SANITIZED_LOW_LATENCY) or $(SANITIZED_RING)"; \
	done

# Data parallelism's promises on this machine, measured: docs/parallel.md has the numbers. All run, whatever misses.
CLUSTER ?= bits codec bytes convergence topologies drift noise uneven kill efficiency join handover backup
test-cluster: install
	@failed=; run() { echo "== deepep $$*, $$(date +%T)"; $(PY) -m deepep "$$@" || failed="$$failed; $$*"; }; \
	run links --check; \
	for what in $(CLUSTER); do run dp $$what; done; \
	[ -z "$$failed" ] || { echo "missed: $${failed#; }"; exit 1; }

# The sdist, and wheels for each Python 3.10 to 3.13 that is found, with and without kernels; DIST=--try installs each.
dist: $(QUICK)
	$(PY) release/dist.py --out dist $(DIST)

# Tables and pictures of docs/performance.md, of docs/figures; on a machine with two GPUs they are measured anew before.
figures: | $(QUICK)
	$(PY) release/figures.py $(FIGURES)

format: | $(QUICK)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info deepep/*.so $(VENV)
