# `make demo` runs a complete LLaVE at a size for a laptop, and `make test` runs the tests. Both write only into this folder.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
PYTHON ?= python3
PROCS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
DATA ?= runs/openmoji
CONFIG ?= examples/tiny.yaml
OUT ?= runs/$(basename $(notdir $(CONFIG)))
ARGS ?=
SEARCH ?= runs/search
PORT ?= 8765
TESTS ?=
# All tests but the longest ones; all of those that are named in TESTS.
MARK ?= $(if $(TESTS),,not slow)
# Processes that share the tests; a single file is not shared.
WORKERS ?= $(if $(findstring .py,$(TESTS)),0,2)
VENV := .venv
# Without a GPU on Linux, pip's default torch would bring several GB of CUDA. Settings of pip that name a source are kept.
CPU_TORCH := https://download.pytorch.org/whl/cpu
PIP_SOURCE = $(shell $(PYTHON) -m pip config list 2>/dev/null | grep -E 'index-url|find-links|no-index')
TORCH_INDEX ?= $(if $(filter 0,$(GPUS)),$(if $(filter Linux,$(shell uname -s)),$(if $(PIP_SOURCE),,$(CPU_TORCH))))
STAMP := $(VENV)/.installed

# The processes of the demo and the tests share the cores; more threads per process make all of them slower.
ifeq ($(GPUS),0)
export OMP_NUM_THREADS := 1
endif
# Some images forbid it; then each of the hundred interpreters that the tests start would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo search test test-slow lint docs docs-serve clean

help:
	@echo "make demo    prepare the OpenMoji pairs, train a tiny LLaVE on them, and evaluate it"
	@echo "make search  search in the demo's images with its model: a local web page, after make demo"
	@echo "make test    run the tests but the longest ones (TESTS=tests/loss: all of those)"
	@echo "make test-slow    run the longest tests"
	@echo "make lint    check the style of the code"
	@echo "make docs    build the documentation as a site in build/site; make docs-serve shows it while you write"
	@echo "make clean   remove .venv and caches, but not runs/"
	@echo
	@echo "PYTHON=$(PYTHON)  interpreter for .venv, 3.11 or later"
	@echo "PROCS=$(PROCS)  processes of the demo: one per GPU, or 2 without a GPU"
	@echo "CONFIG=$(CONFIG)  what the demo trains; examples/tiny_*.yaml are small models of other families"
	@echo "DATA=$(DATA)  OUT=$(OUT)  folder of the demo's data, output directory of its run"
	@echo "SEARCH=$(SEARCH)  PORT=$(PORT)  folder of the images and the index of make search, port of its page"
	@echo "WORKERS=$(WORKERS)  processes that share the tests; each may start four ranks"
	@echo "TORCH_INDEX=$(TORCH_INDEX)  index of torch's wheels; empty: pip's own"
	@echo "ARGS='parallel.tensor=2 train.steps=500'  overrides of CONFIG for the demo"

$(STAMP): requirements.txt tests/engine/requirements.txt setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name a Python 3.11 or later: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but the demo's data needs 3.11 or later: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version 2>&1): installing requirements.txt, which takes some minutes the first time."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(if $(TORCH_INDEX),$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --index-url $(TORCH_INDEX) "$$(grep '^torch==' requirements.txt)" || { echo "$(TORCH_INDEX) cannot be reached: make TORCH_INDEX= takes torch from pip's own index (several GB of CUDA)" >&2; exit 1; })
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target $(VENV)/transformer_engine -r tests/engine/requirements.txt
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "$(VENV) is ready."

$(DATA)/index.json: | $(STAMP)
	@echo "Preparing pairs of OpenMoji images and texts in $(DATA)."
	@$(VENV)/bin/python tools/prepare_data.py openmoji --out $(DATA)

demo: $(STAMP) $(DATA)/index.json
	@echo "Training $(CONFIG) on $(PROCS) processes; the output directory is $(OUT)."
	@PROCS=$(PROCS) PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash examples/pretrain_llave_tiny.sh --config $(CONFIG) data.path=$(DATA) train.output=$(OUT) $(ARGS)
	@echo "Evaluating the checkpoint in $(OUT) on held-out data."
	@$(VENV)/bin/torchrun --standalone --nproc-per-node $(PROCS) tools/evaluate.py prepared --checkpoint $(OUT) --data $(DATA) --out $(OUT)/report --before initial $(filter parallel.%,$(ARGS))
	@echo "The results table and the figures are in $(OUT)/report:"
	@ls -1 $(OUT)/report

search: $(STAMP)
	@test -f $(OUT)/state.json || { echo "there is no trained model in $(OUT): make demo trains it, in some minutes" >&2; exit 1; }
	@test -d $(SEARCH)/images || $(VENV)/bin/python tools/search.py demo-images --out $(SEARCH)/images
	@$(VENV)/bin/python tools/search.py build --checkpoint $(OUT) --pictures $(SEARCH)/images --out $(SEARCH)/index \
		--text-prompt "Find the emoji: {}" --like-prompt "Find the same emoji." --both-prompt "Find the same emoji with {}."
	@$(VENV)/bin/python tools/search.py serve $(SEARCH)/index --port $(PORT)

test: $(STAMP)
	@echo "Running the tests; they are stopped after 25 minutes if they hang."
	@timeout --signal=INT --kill-after=60 1500 $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "$(MARK)" $(TESTS)

test-slow:
	@$(MAKE) --no-print-directory test MARK=slow

lint: $(STAMP)
	@echo "Checking the style with ruff."
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .

docs: $(STAMP)
	@echo "Building the documentation in build/site; a warning, such as a broken link, is an error."
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

docs-serve: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

clean:
	rm -rf $(VENV) build megatron_llave.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
