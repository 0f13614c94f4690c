# `make demo` and `make test` set up everything they need in .venv; all they ask for is Python 3.10 or newer.
#
#   make test PYTHON=python3.12                      another Python (remove .venv first: make distclean)
#   make test TORCH=2.12.1                           another torch, or another build (2.13.0+cu130), in .venv-2.12.1
#   make fuzz N=1000 SEED=1                          fewer random models, other ones
#   make test PIP_ARGS="--extra-index-url <url>"     options for pip; pip's own settings are respected too

PYTHON ?= python3
TORCH ?=
PIP_ARGS ?=
WORKERS ?= 2
N ?= 10000
SEED ?= 0

# What the package asks for in order to run, and for its tests and the zoo, apart from torch and torchvision.
UNPINNED := import importlib.metadata, re; \
  asked = [r.split(";") for r in importlib.metadata.requires("torch-passes")]; \
  wanted = [name for name, *marker in asked if not marker or "test" in marker[0] or "zoo" in marker[0]]; \
  print(*(name for name in wanted if not re.match("torch(vision)?[^a-z-]", name)), sep="\n")

RELEASE := $(or $(TORCH),2.13.0)
VENV := .venv$(if $(TORCH),-$(TORCH))
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
READY := $(VENV)/.ready

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
# With TORCH, tests alone: what ruff says is the same, and mypy's answers hold for the types of the torch that we pin.
test: $(if $(TORCH),$(READY),lint) ## ruff, mypy, then all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) ## measure inference speed and compile time
	@$(if $(TORCH),:,$(PIP_INSTALL) -q -e ".[bench]" -c $(VENV)/constraints.txt)
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

distclean: clean ## also remove .venv, and those of other torches
	rm -rf .venv .venv-*

# Torch comes first and is then held by a constraint. A release already in the environment stays; otherwise the CPU build is
# tried, and the ordinary one is taken only when pip says that there is no CPU build to be had.
#
# With TORCH this goes to an environment of its own, so that .venv stays as it is. pyproject.toml pins torch, and torchvision
# with it, and pip installs nothing against a pin. So the package is installed without its dependencies, and these come after
# it, without the two: torch is there by then, and pip finds the torchvision that goes with it.
$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "torch-passes needs Python 3.10 or newer; '$(PYTHON)' is not that. Choose one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@rm -f $(READY)
	@echo "Setting up $(VENV) (only when pyproject.toml or the Makefile changed); this can take some minutes."
	@if $(BIN)/python -m pip show torch 2>/dev/null | grep -q '^Version: $(RELEASE)'; then :; \
	elif [ -n "$(findstring +,$(RELEASE))" ]; then $(PIP_INSTALL) "torch==$(RELEASE)"; \
	elif $(PIP_INSTALL) "torch==$(RELEASE)+cpu" 2>$(VENV)/pip.log; then :; \
	elif grep -q -e 'No matching distribution found for torch==' -e ResolutionImpossible $(VENV)/pip.log; then \
	  echo 'Note: pip finds no CPU build of torch, so the ordinary one is installed; to choose, point pip at an index with CPU builds (PIP_ARGS="--extra-index-url <url>", or pip config) or set TORCH=<version>.'; \
	  $(PIP_INSTALL) "torch==$(RELEASE)"; \
	else cat $(VENV)/pip.log >&2; exit 1; fi
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >$(VENV)/constraints.txt
ifeq ($(TORCH),)
	@$(PIP_INSTALL) -q -e ".[test,zoo]" -c $(VENV)/constraints.txt
else
	@$(PIP_INSTALL) -q --no-deps -e .
	@$(BIN)/python -c '$(UNPINNED)' >$(VENV)/requirements.txt
	@$(PIP_INSTALL) -q torchvision -r $(VENV)/requirements.txt -c $(VENV)/constraints.txt
endif
	@touch $(READY)
