# Everything runs from .venv, which these targets make. PYTHON chooses the interpreter (>= 3.11).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo results test test-full lint clean

setup: .venv/.installed

# Exact versions from constraints.txt, on which the tests passed; torch first, so that nothing else chooses its version.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gradstats needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps backpack-for-pytorch einops unfoldNd
	touch $@

# The headline experiment in its short form: a table, a figure, a report and W&B offline runs, within minutes.
demo: setup
	$(BIN)/python -m experiments.train experiment=demo

# All studies in full, hours on two cores; what is finished is not run again. Then the documents that quote them.
results: setup
	$(BIN)/python -m experiments.results
	$(BIN)/python -m experiments.list --markdown docs/experiments.md

# Two workers: the suite is sized for two cores.
test: setup lint
	$(BIN)/python -m pytest -n 2

# With README commands, kill -9 and compilation.
test-full: setup lint
	$(BIN)/python -m pytest -n 2 -m 'slow or not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gradstats experiments

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
