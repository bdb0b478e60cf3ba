# Every target builds its own virtual environment when it is missing and re-uses it after.
#   make PYTHON=python3.13 test    runs on another interpreter, in an environment of its own

PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUICK ?=

.DEFAULT_GOAL := help
.PHONY: help tour test smoke check notebooks bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

tour: $(READY)  ## train a network, measure its curvature, prune it: tables, report.json and figures (QUICK=1 for a short one)
	$(BIN)/hessjax tour --out tour-out $(if $(QUICK),--quick)

test: $(READY)  ## the whole test suite, docstring and README examples included
	$(BIN)/python -m pytest

smoke: $(READY)  ## the essential part of the suite, in two minutes
	$(BIN)/python -m pytest -m smoke tests

check: $(READY)  ## format, lint, types, direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

notebooks: $(READY)  ## execute every notebook (QUICK=1 for a short form that writes nothing)
	$(BIN)/python notebooks/execute.py $(if $(QUICK),--quick)

bench: $(READY)  ## every benchmark, and the table of their results (QUICK=1 for small sizes)
	$(BIN)/python benchmarks/run_all.py $(if $(QUICK),--quick)

clean:  ## remove environments and caches
	rm -rf .venv* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache tour-out
