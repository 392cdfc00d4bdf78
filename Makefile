# make train       set up .venv, train the digits preset and evaluate the result
# make test        set up .venv and run the tests; make test-full adds the slow ones
# make test-oldest  what depends on PyTorch and Triton, with the oldest versions that are supported, in .venv-oldest
# make lint        check style, format and types
# make bench       measure this machine, into benchmarks/results
# make gpu-report  everything that needs a GPU, in 8 minutes
#
# Variables: PYTHON, VENV, RUN (name of the run), ARGS (further options of `sra-fast train` or of the report), TORCH and
# TORCH_INDEX (which build of torch), WORKERS (processes that run tests), BENCH (options of bench_step), PYTHON_RUN.
#
# bench and gpu-report can use an existing environment: if there is no VENV and the torch of PYTHON sees a GPU, they run
# with PYTHON and install nothing. PYTHON_RUN=/path/to/python always takes precedence.

PYTHON  ?= python3
VENV    ?= .venv
RUN     ?= digits-$(shell date +%Y%m%d-%H%M%S)
ARGS    ?=
WORKERS ?= auto

# Without an NVIDIA GPU, the CPU build of torch, a tenth of the size of the CUDA build: from pip's own index if it has that
# build, else from TORCH_INDEX. With a GPU, the CUDA build from pip's own index.
ifeq ($(shell command -v nvidia-smi 2>/dev/null)$(shell uname -s),Linux)
  TORCH       ?= torch==2.13.0+cpu
  TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
TORCH       ?= torch>=2.11
TORCH_INDEX ?=

PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
READY  := $(VENV)/.ready
# Tests of one file share a worker, and with it their fixtures. One thread each: their tensors are small, and OpenMP threads
# of several processes slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile

ifneq ($(filter bench gpu-report,$(MAKECMDGOALS)),)
  ifeq ($(PYTHON_RUN)$(wildcard $(READY)),)
    PYTHON_RUN := $(shell $(PYTHON) -c 'import torch; torch.cuda.is_available() and print("$(PYTHON)")' 2>/dev/null)
  endif
endif
# Run by path: the caller's Python may not have sra_fast installed.
IN_TREE := $(or $(PYTHON_RUN),$(VENV)/bin/python) benchmarks/in_tree.py .
# On a CPU a step of SiT-S takes seconds; on a GPU one of SiT-XL takes a tenth of a second.
CPU_RUNGS := public "bf16 teacher to its tap" "+ torch.compile" "+ no host reads" ours "ours eager" "ours fp32" "ours, plain SiT"
BENCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),--size xl --batch 32,--size s --batch 8 --repeats 12 --warmup 2 --rungs $(CPU_RUNGS))

# The oldest versions that are promised: setup.py, the kernels, compiled steps, weights and checkpoints.
OLDEST_TORCH ?= torch==2.11.0$(if $(findstring +cpu,$(TORCH)),+cpu)
OLDEST_TRITON := triton==3.6.0
OLDEST_TESTS := setup library adamw_ema gradient_norm adaln alignment alignment_kernel perturb perturb_kernel philox rows \
  transformer attention backends graph runner step state inputs ring public_weights checkpoint stored_checkpoints resume choice \
  linear_gelu plan cluster_step

.PHONY: train test test-full test-oldest bench gpu-report lint setup clean

train: $(READY)
	$(VENV)/bin/sra-fast train digits --run.name $(RUN) $(ARGS)

test: $(READY)
	$(PYTEST) -m "not slow"

test-full: $(READY)
	$(PYTEST)

test-oldest:
	$(MAKE) setup VENV=$(VENV)-oldest TORCH="$(OLDEST_TORCH)" EXACT="$(OLDEST_TRITON)"
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile -m "not slow" \
	  $(OLDEST_TESTS:%=tests/test_%.py)

# With the caller's Python, try to build the compiled operators in place.
OPERATORS := $(if $(PYTHON_RUN),sra_fast/_ops.so)
sra_fast/_ops.so: setup.py CMakeLists.txt $(wildcard csrc/*)
	-$(PYTHON_RUN) setup.py --quiet build_ext --inplace

bench: $(or $(OPERATORS),$(READY))
	$(IN_TREE) benchmarks.bench_step $(BENCH)
	$(IN_TREE) benchmarks.bench_kernels
	$(IN_TREE) benchmarks.bench_optimizer
	$(IN_TREE) benchmarks.bench_data
	$(IN_TREE) benchmarks.readme --print

gpu-report: $(or $(OPERATORS),$(READY))
	$(IN_TREE) benchmarks.gpu_report $(ARGS)

setup: $(READY)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/* tests/*.c benchmarks/static/*.cpp
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

$(READY): pyproject.toml setup.py Makefile CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=70.1" wheel
	$(PIP) install "$(TORCH)" $(EXACT) $(if $(TORCH_INDEX),|| $(PIP) install "$(TORCH)" $(EXACT) --extra-index-url $(TORCH_INDEX))
	@PATH="$(VENV)/bin:$$PATH" command -v cmake >/dev/null || $(PIP) install cmake
	$(PIP) install --no-build-isolation -e ".[digits,dali,tensorboard,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
