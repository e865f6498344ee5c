# Two commands set everything up; each works alone on a new machine with Python 3.10 or later.
#   make reproduce   installs, then reproduces the paper's claims into runs/
#   make test        installs, then runs linters, type checks and tests
# `make thorough` is `make test` with the slow tests too: whole products of settings, processes that are killed.
# `make docs` builds the documentation as a site into site/.

PYTHON ?= python3
VENV := .venv
# The tested build. The package itself only has a floor (pyproject.toml).
TORCH := torch==2.13.0
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal -q

.PHONY: reproduce test thorough lint docs clean

reproduce: $(VENV)/.lab
	$(VENV)/bin/normwise reproduce --out runs

test: $(VENV)/.dev lint
	$(PYTEST) -m 'not thorough'

thorough: $(VENV)/.dev lint
	$(PYTEST)

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

clean:
	rm -rf $(VENV) runs build site
