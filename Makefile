# make train   sets up .venv, trains the digits preset and judges the result       make test   sets up .venv and runs the tests
# Variables: PYTHON, VENV, RUN (name of the run), ARGS (more options of `sra-fast train`), TORCH and TORCH_INDEX.

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

.PHONY: train test test-full lint clean

train: $(READY)
	$(VENV)/bin/sra-fast train digits --run.name $(RUN) $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -m "not slow"

test-full: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(READY): pyproject.toml setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install setuptools wheel
	$(PIP) install "$(TORCH)" $(if $(TORCH_INDEX),|| $(PIP) install "$(TORCH)" --extra-index-url $(TORCH_INDEX))
	$(PIP) install --no-build-isolation -e ".[digits,dali,tensorboard,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
