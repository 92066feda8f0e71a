# Each target makes its own virtual environment: nothing but Python 3.11 or newer and a package index is needed.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:  ## say what the targets do
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/demo  ## probe, predict, measure, tune, export, report (DEMO_FLAGS adds options)
	$(BIN)/ridgepoint demo $(DEMO_FLAGS)

test: lint  ## lint, types and the whole test suite (PYTEST_FLAGS adds options, JOBS=2 processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_FLAGS)

lint: $(VENV)/dev  ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove the virtual environment, caches and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: '$(PYTHON)' must be Python 3.11 or newer; name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "make: '$(PYTHON)' lacks venv; install it (Debian: apt install python3-venv) or use PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what the demo needs into $(VENV) (torch is the large part)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what the tests need into $(VENV) (torch is the large part)"
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/demo
