# Every target builds its own virtual environment when it is missing and re-uses it after.
#   make PYTHON=python3.13 test    runs on another interpreter, in an environment of its own

PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DOCS := $(VENV)/.ready-docs
READY_TOUR := $(VENV)/.ready-tour
READY_PEERS := $(VENV)-peers/.ready
VENV_IS_GOOD := $(BIN)/python -m pip --version >/dev/null 2>&1
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
QUICK ?=

.DEFAULT_GOAL := help
.PHONY: help install install-peers tour test smoke check notebooks bench peers docs dist clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# The tour needs no tools of development: half of the environment, and of the waiting.
$(READY_TOUR): pyproject.toml
	@$(VENV_IS_GOOD) || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing what the tour needs into $(VENV), about a minute the first time."
	$(INSTALL) '.[tour]'
	@touch $@

$(READY): pyproject.toml
	@$(VENV_IS_GOOD) || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the library and its tools into $(VENV), one to two minutes the first time."
	$(INSTALL) '.[dev]'
	@touch $(READY_TOUR) $@

$(READY_DOCS): $(READY)
	$(INSTALL) '.[docs]'
	@touch $@

install: $(READY)  ## the environment alone; the other targets make it when they need it

tour: $(READY_TOUR)  ## train a network, measure its curvature, prune it: one page, tour-out/report.html (QUICK=1 for a short one)
	$(BIN)/hessjax tour --force --out tour-out $(if $(QUICK),--quick)

test: $(READY)  ## the whole test suite, docstrings, README and pages included (about 20 minutes on two cores)
	@echo "The whole suite: about 20 minutes on two cores, less the second time. The essential part: make smoke"
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

# PyTorch is large, so the peers have an environment of their own. One that cannot be installed is a row that
# says so: where the extra fails as a whole, its packages are tried one by one.
PEERS_PIP = $(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check
PEERS_NAMES = $(VENV)-peers/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))\
  ['project']['optional-dependencies']['peers'][1:], sep='\n')"
$(READY_PEERS): pyproject.toml
	@$(VENV)-peers/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)-peers
	@echo "Installing the peers into $(VENV)-peers, some minutes the first time."
	$(PEERS_PIP) --editable '.[peers]' || { $(PEERS_PIP) --editable '.[benchmarks]' && $(PEERS_NAMES) | \
	  while read -r peer; do $(PEERS_PIP) "$$peer" || echo "$$peer cannot be installed here."; done; }
	@touch $@

install-peers: $(READY_PEERS)

peers: $(READY_PEERS)  ## what a reader would pick instead, on the same weights and data (QUICK=1 for small sizes)
	PYTHONPATH=benchmarks $(VENV)-peers/bin/python -m peers $(if $(QUICK),--quick)

docs: $(READY_DOCS)  ## the site, in docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -a -b html docs docs/_build/html
	$(BIN)/python docs/_ext/offline.py docs/_build/html

dist: $(READY)  ## sdist and wheel in dist/, the wheel tried in an environment of its own
	rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv --clear dist/.venv
	dist/.venv/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd dist && .venv/bin/python -I -c "import hessjax as hj; print(hj.__file__, hj.__version__)"
	rm -rf dist/.venv

clean:  ## remove environments and caches
	rm -rf .venv* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache tour-out dist \
	       docs/_build docs/_generated docs/reference docs/tutorials/*.ipynb docs/tutorials/figures \
	       docs/project/benchmarks.md docs/project/changelog.md docs/project/contributing.md
