# Two commands from a bare machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
# One release, so that the set-up is the same everywhere; any torch that pyproject.toml allows works
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-old-cpu test-long torture bench gpu lint docs docs-commands packages notebooks clean

demo: $(VENV)/installed
	$(BIN)/ldm3d demo --out demo

test: $(VENV)/installed
	$(BIN)/ruff check ldm3d tests benchmarks
	$(BIN)/ruff format --check ldm3d tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# As on a CPU with AVX2 and nothing newer, and on one with SSE4.1: sums are rounded otherwise, and bfloat16 is not multiplied
test-old-cpu: $(VENV)/installed
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
		$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# Kills, full disks, damaged and hostile files; the table goes into docs/reliability.md
torture: $(VENV)/installed
	cd tests && ../$(BIN)/python -m torture --write ../docs/reliability.md

# What two cores can do in about 15 minutes; MODEL is a trained pipeline, such as the demo's
MODEL ?= demo/run/model
bench: $(VENV)/installed
	$(BIN)/python benchmarks/linear_path.py
	$(BIN)/python benchmarks/phantoms.py
	$(BIN)/python benchmarks/attention.py --quick
	$(BIN)/python benchmarks/memory.py --quick
	$(BIN)/python benchmarks/full_size.py --quick
	$(BIN)/python benchmarks/autoencoder_quality.py --minutes 0.4
	$(BIN)/python benchmarks/diffusion_quality.py --minutes 0.4 --autoencoder-minutes 0.4
	if [ -d $(MODEL) ]; then $(BIN)/python benchmarks/sampling.py $(MODEL) --quick --volumes 16; \
	else echo "sampling: skipped, there is no model in $(MODEL); run make demo first, or give MODEL=FOLDER"; fi
	$(BIN)/python benchmarks/plots.py

# What a GPU can show, in 25 minutes: PART=2 for one part, DRY=1 with tiny sizes on any machine, DATA= a BIDS folder, OUT= a
# folder for the results. Installs nothing: PYTHON may be any with the packages, or with their folder on PYTHONPATH; if it is
# not given, that of the virtual environment where there is one
OUT ?= gpu-results
GPU_PYTHON = $(if $(filter file default undefined,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) benchmarks/gpu.py --out "$(OUT)" \
		$(if $(PART),--part $(PART)) $(if $(DRY),--dry) $(if $(DATA),--data "$(DATA)")

lint: $(VENV)/installed
	$(BIN)/ruff check --fix ldm3d tests benchmarks
	$(BIN)/ruff format ldm3d tests benchmarks
	$(BIN)/mypy

# The documentation as a site, in site/; nothing is fetched from a network
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Runs the commands of README and docs as they stand, with a tiny model under every name
docs-commands: $(VENV)/installed
	$(BIN)/python -m pytest tests/test_commands_run.py -m slow

# Installs sdist and wheel into empty environments, from the registry that pip uses, and runs the quick demo in each
packages: $(VENV)/installed
	$(BIN)/python -m pytest tests/test_packages.py -m slow

# Runs the notebooks of docs/notebooks
notebooks: $(VENV)/installed
	$(BIN)/python -m pytest tests/test_notebooks.py -m slow

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ldm3d needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
# "compat": also from the folder that holds the clone, `import ldm3d` finds the package and not the clone's folder
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=compat $(TORCH) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo runs site *.egg-info
