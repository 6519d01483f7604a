# Two targets do everything on a fresh machine with only Python: `make chat` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := src/openm3/msa/cpu_decode.c  # compiled by the installation

.PHONY: chat test lint soak clean

chat: $(VENV)/.base
	@$(BIN)/openm3 chat

test: $(VENV)/.test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

soak: $(VENV)/.test  ## Long checks; their results are committed under benchmarks/results.
	$(BIN)/python -m pytest -m soak --timeout=7200

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# PyTorch's CPU build where it is to be had: the default build for Linux brings gigabytes of CUDA libraries.
$(VENV)/.torch: $(VENV)/bin/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q torch==2.13.0
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/pip install -q -e ".[test]"
	@touch $@ $(VENV)/.base

clean:
	rm -rf $(VENV) build dist src/*.egg-info
