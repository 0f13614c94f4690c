# `make demo` and `make test` set up everything they need in .venv; all they ask for is Python 3.10 or newer.
#
#   make test PYTHON=python3.12                      another Python (remove .venv first: make distclean)
#   make test TORCH=2.13.0+cu130                     another build of torch
#   make fuzz N=1000 SEED=1                          fewer random models, other ones
#   make test PIP_ARGS="--extra-index-url <url>"     options for pip; pip's own settings are respected too

PYTHON ?= python3
TORCH ?=
PIP_ARGS ?=
WORKERS ?= 2
N ?= 10000
SEED ?= 0

TORCH_RELEASE := 2.13.0
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
READY := .venv/.ready$(if $(TORCH),-$(TORCH))

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench zoo fuzz clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1 \2/p' Makefile | while read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(READY) ## create .venv and install everything (the other targets do so by themselves)

demo: $(READY) ## optimize a ResNet-50; the result and the graph of every step go to demo/
	$(BIN)/torch-passes optimize torchvision:resnet50 --input 1x3x224x224 --passes fuse_conv_bn_relu,cast_half \
	  --out demo/resnet50.pt --dump-dir demo/graphs

# One thread per worker: torch's threads spin while they wait, and two workers with two threads each on two cores
# measured fifteen times slower than with one thread each.
test: lint ## ruff, mypy, then all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) ## measure inference speed and compile time
	@$(PIP_INSTALL) -q -e ".[bench]" -c .venv/constraints.txt
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.compile_time
	$(BIN)/python -m benchmarks.saved_file
	$(BIN)/python -m benchmarks.fusion
	$(BIN)/python -m benchmarks.half

zoo: $(READY) ## some 150 architectures through optimize, one after another (resumes); the table goes to zoo/zoo.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo --out zoo

fuzz: $(READY) ## N random models (10000) through random pipelines, the invariants of every pass checked; see fuzz/
	OMP_NUM_THREADS=1 $(BIN)/python -m passes.testing.fuzz --examples $(N) --workers $(WORKERS) --seed $(SEED) --out fuzz

clean: ## remove outputs and caches
	rm -rf demo zoo fuzz frontends build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean ## also remove .venv
	rm -rf .venv

# Torch comes first and is then held by a constraint. Without TORCH: a release already in .venv stays; otherwise the CPU
# build is tried, and the ordinary one is taken only when pip says that there is no CPU build to be had.
$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "torch-passes needs Python 3.10 or newer; '$(PYTHON)' is not that. Choose one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@rm -f .venv/.ready*
	@echo "Setting up .venv (only when pyproject.toml or the Makefile changed); this can take some minutes."
	@if [ -n "$(TORCH)" ]; then $(PIP_INSTALL) "torch==$(TORCH)"; \
	elif $(BIN)/python -m pip show torch 2>/dev/null | grep -q '^Version: $(TORCH_RELEASE)'; then :; \
	elif $(PIP_INSTALL) "torch==$(TORCH_RELEASE)+cpu" 2>.venv/pip.log; then :; \
	elif grep -q 'No matching distribution found for torch==' .venv/pip.log; then \
	  echo 'Note: pip finds no CPU build of torch, so the ordinary one is installed; to choose, point pip at an index with CPU builds (PIP_ARGS="--extra-index-url <url>", or pip config) or set TORCH=<version>.'; \
	  $(PIP_INSTALL) "torch==$(TORCH_RELEASE)"; \
	else cat .venv/pip.log >&2; exit 1; fi
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >.venv/constraints.txt
	@$(PIP_INSTALL) -q -e ".[test,zoo]" -c .venv/constraints.txt
	@touch .venv/.ready $(READY)
