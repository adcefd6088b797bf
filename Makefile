# Two commands from a bare machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
# One release, so that the set-up is the same everywhere; any torch that pyproject.toml allows works
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long lint clean

demo: $(VENV)/installed
	$(BIN)/ldm3d demo --out demo

test: $(VENV)/installed
	$(BIN)/ruff check ldm3d tests benchmarks
	$(BIN)/ruff format --check ldm3d tests benchmarks
	$(BIN)/python -m pytest -m "not slow"

test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check --fix ldm3d tests benchmarks
	$(BIN)/ruff format ldm3d tests benchmarks

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ldm3d needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo runs *.egg-info
