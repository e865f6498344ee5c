# Two commands set everything up; each works alone on a new machine with Python 3.10 or later.
#   make reproduce   installs, then reproduces the paper's claims into runs/
#   make test        installs, then runs linters, type checks and tests
#   make core        installs, then runs the library's own tests on any torch and Python, such as
#                    make core PYTHON=python3.10 TORCH=torch==2.6.0 VENV=.venv-2.6
#   make dist        builds wheel and sdist into dist/ and checks them
# `make thorough` is `make test` with the slow tests too: whole products of settings, processes that are killed.
# `make docs` builds the documentation as a site into site/.

PYTHON ?= python3
VENV := .venv
# The tested build. The package itself only has a floor (pyproject.toml).
TORCH := torch==2.13.0
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal -q

# What stands on torch and numpy alone: no lab, no trainers, no browser.
CORE := $(addprefix tests/,test_norms.py test_units.py decay distributed invariance monitor normalization planning theory)

.PHONY: reproduce test tests thorough core dist lint docs clean

reproduce: $(VENV)/.lab
	$(VENV)/bin/normwise reproduce --out runs

test: $(VENV)/.dev
	@$(MAKE) --jobs 2 lint tests

thorough: $(VENV)/.dev
	@$(MAKE) --jobs 2 lint tests SELECTED=

SELECTED := -m 'not thorough'
tests: $(VENV)/.dev
	$(PYTEST) $(SELECTED)

core: $(VENV)/.core
	$(PYTEST) $(SELECTED) $(CORE)

dist: $(VENV)/.dist
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*
	sha256sum dist/*

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

docs: $(VENV)/.docs
	rm -rf site
	$(VENV)/bin/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . site

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.lab: $(VENV)/.venv pyproject.toml
	@echo "installing $(TORCH) and normwise into $(VENV): 1.3 GB, some minutes, once"
	$(PIP) $(TORCH)
	$(PIP) -e '.[lab,peers]'
	touch $@

$(VENV)/.dev: $(VENV)/.lab pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.venv pyproject.toml
	$(PIP) $(TORCH)
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.core: $(VENV)/.venv pyproject.toml
	$(PIP) $(TORCH)
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.dist: $(VENV)/.venv
	$(PIP) build twine
	touch $@

clean:
	rm -rf $(VENV) runs build dist site
