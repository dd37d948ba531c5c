# Everything needs only Python 3.11 and make; the first target to run makes .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# By exactly this version and before the rest: otherwise pip resolves torch to its newest CUDA build, several GB.
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# What depends on the versions of transformers, peft, accelerate, TRL and the hub; the rest of the suite does not.
DEPENDS := tests/cli/test_commands.py tests/cli/test_run.py tests/checkpoint/test_converted.py \
	tests/checkpoint/test_hub.py tests/checkpoint/test_packed.py tests/checkpoint/test_saving.py tests/hf \
	tests/packed tests/surgery/test_skeleton.py tests/test_accelerate.py tests/test_adapters_merged.py \
	tests/test_architectures.py tests/test_heads.py tests/test_imports.py tests/test_merge.py tests/test_peft.py tests/test_private.py \
	tests/test_tensor_parallel.py tests/test_trainer.py tests/test_trl.py tests/watch/test_trainer.py

# Marked so is what shows nothing of those libraries in these files: another case, another process, torch's compiler.
SET := -n 2 --dist worksteal -m "not one_version" $(DEPENDS)

.PHONY: help demo test test-oldest test-axolotl test-serving test-newest test-vllm coverage check format clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -e .
	@touch $@

.venv/tested: .venv/installed
	$(PIP) -e '.[test,dev]'
	@touch $@

# A set of versions that users have: .venv-NAME by constraints-NAME.txt. The oracles that only formats need are left out:
# older peft fails beside a newer torchao.
.venv-%/tested: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -c constraints-$*.txt $(TORCH)
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e '.[trl]' pytest pytest-xdist scikit-learn
	@touch $@

# Exactly what the file lists: see there.
.venv-vllm/tested: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: .venv/installed  ## plan, apply, inspect, reload and measure the bundled model
	$(BIN)/python examples/quickstart.py

test: .venv/tested  ## run the whole suite
	$(BIN)/pytest -n 2 --dist worksteal

coverage: .venv/tested  ## which branches a part of the suite takes, and whether they are as many as before
	$(BIN)/pytest -n 2 --dist worksteal --cases 3 --cov --cov-report=term

test-oldest: .venv-oldest/tested  ## run what depends on the libraries' versions, with the oldest
	.venv-oldest/bin/pytest $(SET)

test-axolotl: .venv-axolotl/tested  ## the same with what axolotl pins
	.venv-axolotl/bin/pytest $(SET)

test-serving: .venv-serving/tested  ## the same with what vLLM and SGLang pin
	.venv-serving/bin/pytest $(SET)

test-newest: .venv-newest/tested  ## the same with the newest transformers, which asks for a later peft than there is
	.venv-newest/bin/pytest $(SET)

# vLLM's own code warns, which the suite makes errors of.
test-vllm: .venv-vllm/tested  ## roll out with a real vLLM on the CPU, and compare with the model
	.venv-vllm/bin/pytest -W default tests/vllm

check: .venv/tested  ## what a change must pass before it lands: format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/tested  ## rewrite the files as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the targets made
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build dist out
