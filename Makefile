# Everything needs only Python 3.11 and make; the first target to run makes .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# By exactly this version and before the rest: otherwise pip resolves torch to its newest CUDA build, several GB.
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test coverage check format clean
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -e .
	@touch $@

.venv/tested: .venv/installed
	$(PIP) -e '.[test,dev]'
	@touch $@

demo: .venv/installed  ## plan, apply, inspect, reload and measure the bundled model
	$(BIN)/python examples/quickstart.py

test: .venv/tested  ## run the whole suite
	$(BIN)/pytest -n 2 --dist worksteal

coverage: .venv/tested  ## which branches a part of the suite takes, and whether they are as many as before
	$(BIN)/pytest -n 2 --dist worksteal --cases 3 --cov --cov-report=term

check: .venv/tested  ## what a change must pass before it lands: format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/tested  ## rewrite the files as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the targets made
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build dist out
