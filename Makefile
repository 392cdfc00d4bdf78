# make train   sets up .venv, trains the digits preset and judges the result       make test   sets up .venv and runs the tests
# make bench   how fast this machine is, into benchmarks/results       make gpu-report   all that needs a GPU, in 8 minutes
# Variables: PYTHON, VENV, RUN (name of the run), ARGS (more options of `sra-fast train` or of the report), TORCH and
# TORCH_INDEX, BENCH (options of bench_step), PYTHON_RUN.
# On a GPU machine with an environment of its own, bench and gpu-report install nothing: where there is no VENV and PYTHON
# has a torch that sees a GPU, they run in it. PYTHON_RUN=/path/to/python says which, whatever else there is.

PYTHON ?= python3
VENV   ?= .venv
RUN    ?= digits-$(shell date +%Y%m%d-%H%M%S)
ARGS   ?=

# Without an NVIDIA GPU the CPU build of torch, a tenth of the size of the CUDA build; pip's own index serves if it has that
# build, else TORCH_INDEX. With a GPU the CUDA build, from pip's own index.
ifeq ($(shell command -v nvidia-smi 2>/dev/null)$(shell uname -s),Linux)
  TORCH       ?= torch==2.13.0+cpu
  TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
TORCH       ?= torch>=2.11
TORCH_INDEX ?=

PIP   := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready

ifneq ($(filter bench gpu-report,$(MAKECMDGOALS)),)
  ifeq ($(PYTHON_RUN)$(wildcard $(READY)),)
    PYTHON_RUN := $(shell $(PYTHON) -c 'import torch; torch.cuda.is_available() and print("$(PYTHON)")' 2>/dev/null)
  endif
endif
# By its file, because an environment of another's has sra_fast not installed.
IN_TREE := $(or $(PYTHON_RUN),$(VENV)/bin/python) benchmarks/in_tree.py .
# A step of SiT-S takes a CPU some seconds, one of SiT-XL a GPU a tenth of one.
CPU_RUNGS := public "bf16 teacher to its tap" "+ torch.compile" "+ no host reads" ours "ours eager" "ours fp32" "ours, plain SiT"
BENCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),--size xl --batch 32,--size s --batch 8 --repeats 12 --warmup 2 --rungs $(CPU_RUNGS))

.PHONY: train test test-full bench gpu-report lint setup clean

train: $(READY)
	$(VENV)/bin/sra-fast train digits --run.name $(RUN) $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -m "not slow"

test-full: $(READY)
	$(VENV)/bin/python -m pytest

# In an environment of another's the compiled operators are built beside the sources, if they can be.
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

$(READY): pyproject.toml setup.py Makefile CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install setuptools wheel
	$(PIP) install "$(TORCH)" $(if $(TORCH_INDEX),|| $(PIP) install "$(TORCH)" --extra-index-url $(TORCH_INDEX))
	@PATH="$(VENV)/bin:$$PATH" command -v cmake >/dev/null || $(PIP) install cmake
	$(PIP) install --no-build-isolation -e ".[digits,dali,tensorboard,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
