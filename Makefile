# Every target makes the environment it needs by itself: `make train` on a fresh machine is enough.
#
#   PYTHON=python3.12 make test    choose the interpreter of a new environment (3.11, 3.12 or 3.13)
#   VENV=/tmp/env make test        put the environment elsewhere
#   JOBS=8 make test               tests at a time
#   ARGS="..." make train          more arguments of the command that the target runs

VENV ?= .venv
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
SETUP := settings.ini setup.py pyproject.toml constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env train test bench docs browse export clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(VENV)/.installed  ## make the environment, or bring it up to date

train: $(VENV)/.installed  ## train the tiny Ferret on the CPU; prints its scores, draws its answers
	$(BIN)/ferret-lite fit --config configs/tiny.yaml $(ARGS)

# One thread for each test: $(JOBS) tests at a time share the cores.
test: $(VENV)/.installed  ## run the tests and every notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxschedchunk 1 --durations 10 $(ARGS)

bench: $(VENV)/.installed  ## run every benchmark and print its ratios
	@set -e; for script in benchmarks/*_*.py; do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

docs: $(VENV)/.installed-docs  ## build the book and check it: docs/_build/html/index.html
	$(BIN)/python docs/build.py $(ARGS)

browse: $(VENV)/.installed-docs  ## try the built book in a browser, every page of it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) docs/tests $(ARGS)

export: $(VENV)/.installed  ## write ferret_lite/*.py and README.md from the notebooks, then clean those
	$(BIN)/python docs/colab.py
	$(BIN)/nbdev-export
	$(BIN)/python docs/readme.py
	$(BIN)/nbdev-clean

clean:  ## remove what was built; keeps the environment and runs/
	rm -rf docs/_src docs/_build build dist _proc .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps are made last: a set-up that was interrupted is done again, a finished one costs nothing.
$(VENV)/.installed: $(SETUP)
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then python=$$(.ci/find-python $(PYTHON)) && \
		echo "Making the environment $(VENV) with $$python (a few minutes, once)" && "$$python" -m venv --clear $(VENV); fi
	$(PIP_INSTALL) '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP_INSTALL) '.[dev,docs]'
	@touch $@
