# Two commands do everything, set-up included: `make demo` and `make test`.
# On a machine with Hopper GPUs: `make test-gpu`, `make test-gpu-sanitize`; docs/verification.md.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
BUILT  := build/.installed
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml constraints.txt

.PHONY: all demo test test-emulator check-style check-types unit install format clean test-gpu test-gpu-sanitize
all: install

$(PY):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip

$(BUILT): $(PY) $(SOURCES)
	$(PY) -m pip install -q -c constraints.txt -e '.[test]'
	@mkdir -p build && touch $@

install: $(BUILT)

demo: install
	$(PY) -m deepep demo --ranks 4 --out demo-output

test: check-style check-types test-emulator unit

check-style: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The package as users import it, laid out by links, because mypy does not follow package_dir.
check-types: install
	rm -rf build/types && mkdir -p build/types/deepep
	ln -s $(CURDIR)/deepep/* build/types/deepep/
	ln -s $(CURDIR)/reference build/types/deepep/reference
	ln -s $(CURDIR)/sim build/types/deepep/sim
	cd build/types && ../../$(PY) -m mypy --config-file ../../pyproject.toml -p deepep

# Buffer's own tests, on the kernels' source.
test-emulator: install
	DEEPEP_BACKEND=emulator $(PY) -m pytest -q tests/api

unit: install
	$(PY) -m pytest

# The Python to test GPUs with: this checkout's own, or one in which deepep, pytest and cloudpickle are installed.
GPU_PY ?= $(PY)
GPU_INSTALLED := $(if $(filter $(PY),$(GPU_PY)),install)
GPU_TESTS ?= tests/backends/cuda tests/reference tests/cli/test_bench.py
SANITIZED := small_shapes or num_worst or masked or too_many or test_layout

test-gpu: $(GPU_INSTALLED)
	NCCL_NVLS_ENABLE=0 $(GPU_PY) -m pytest -m gpu --durations=10 $(GPU_TESTS)

test-gpu-sanitize: $(GPU_INSTALLED)
	@set -e; for tool in memcheck racecheck synccheck; do \
	  echo "== $$tool"; \
	  compute-sanitizer --tool $$tool --error-exitcode 9 --target-processes all \
	    $(GPU_PY) -m pytest -q tests/backends/cuda/test_virtual_ranks.py -k "$(SANITIZED)"; \
	done

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info deepep/*.so $(VENV)
