# make demo    prune the heads of the bundled model; the report is a web page
# make test    format, lint, types, import contract, tests
# Needs Python 3.11 or later and make; sets up .venv by itself. Another Python: make PYTHON=... demo

PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SHELL := bash
RUNS ?= runs
WORKERS ?= 2

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: readme demo test lint format notebooks faults bench clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/ablate prune --runs $(RUNS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

lint: .venv/.installed-test
	$(BIN)/ruff format --check -q
	$(BIN)/ruff check -q
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.installed-test
	$(BIN)/ruff check -q --fix-only
	$(BIN)/ruff format -q

notebooks: .venv/.installed-test
	$(BIN)/python -m pytest -q --nbmake --nbmake-timeout=1200 -p no:xdist notebooks

# The README's numbers: the demo, what the bundled model can do, and the newest finished bench.
readme: .venv/.installed
	$(BIN)/python -m experiments.readme

faults: .venv/.installed-test
	$(BIN)/python -m pytest -q -m faults

# How long a user waits: for help, for the default study from nothing, and for a sweep, choices and
# importance beside what one would otherwise run.
bench: .venv/.installed
	time $(BIN)/ablate --help >/dev/null
	runs=$$(mktemp -d) && time $(BIN)/ablate prune --runs $$runs && rm -r $$runs
	$(BIN)/ablate bench --runs $(RUNS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# torch goes first and by itself: what pip then installs finds it there and leaves it alone.
.venv/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later on PATH: install one, or make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@
