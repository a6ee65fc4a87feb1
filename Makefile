# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
BUILT  := build/.installed
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml constraints.txt

.PHONY: all demo test check-style check-types unit install format clean
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

test: check-style check-types unit

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

unit: install
	$(PY) -m pytest

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info deepep/*.so $(VENV)
