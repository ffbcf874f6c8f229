# `make quickstart` and `make test` work from a fresh clone: each makes .venv first, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread per process: two ranks, or two test workers, share the cores. Nothing here waits for a terminal.
export OMP_NUM_THREADS ?= 1
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(BIN):$(PATH)

.PHONY: help install quickstart test test-gpu soak lint docs clean

help:
	@echo "make quickstart   install into $(VENV) if needed, run the whole chain on sample data, write runs/quickstart/report.html"
	@echo "make test         install into $(VENV) if needed, then lint, types and tests"
	@echo "make test-gpu     the tests that need a CUDA device, some minutes"
	@echo "make soak         kills, stops and damaged checkpoints over real runs, about a quarter of an hour"
	@echo "make lint         lint and types only"
	@echo "make docs         the documents as a site, in site/"
	@echo "make install      install into $(VENV) and stop (PYTHON=... chooses the interpreter, 3.11 or newer)"
	@echo "make clean        remove $(VENV), caches and build leftovers; runs/ stays"

install: $(INSTALLED)

# Redone when the dependencies change; a broken-off installation leaves no mark and goes on the next time.
$(INSTALLED): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 on PATH; name one: make PYTHON=/path/to/python3.11"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$("$(PYTHON)" --version) found, 3.11 or newer needed; name one: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 2; }
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[sample,eval,dev,docs]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/dualtoken quickstart

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck --shell bash .ci/run launchers/*/*.sh launchers/*/*.sbatch

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 15

test-gpu: $(INSTALLED)
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -m gpu -s -rs

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/test_pretrain/test_soak.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
