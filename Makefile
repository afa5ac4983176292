# Tandem's commands. `make quickstart` and `make test` set up all they need on a machine with Python 3.11, 3.12 or 3.13, make, gcc
# and pip.

# The first of these that runs. Python 3.11 comes first because every test runs on it.
SUPPORTED := import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or
FIND_PYTHON = for p in python3.11 python3.12 python3.13 python3; do $$p -c '$(SUPPORTED) sys.exit(1)' 2>/dev/null && command -v $$p && break; done
PYTHON ?= $(or $(shell $(FIND_PYTHON)),python3)
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of torch is on an index of its own. It is named in the one command that installs torch, and not retried,
# because pip would ask it for every other package too. Any build of that version which is in the environment already stays: where
# the index is not reached, `pip install torch==2.13.0` there, before `make setup`, brings the CUDA build, which works too (3 GB more).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_HERE = ls -d $(VENV)/lib/python*/site-packages/torch-$$(sed 's/^torch==//; s/+.*//' requirements/torch-cpu.lock)*.dist-info >/dev/null 2>&1
NO_TORCH = No CPU build of torch for $(PYTHON) is at $(TORCH_INDEX), nor where pip is told to look. Set TORCH_INDEX to a mirror, or PYTHON to another version of Python (CONTRIBUTING.md, Versions of Python).
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# cpu, for this machine and its tests; gpu, for nodes with NVIDIA GPUs. An environment keeps what it was made with.
LOCK ?= $(if $(wildcard $(VENV)/.ready-gpu),gpu,cpu)
READY := $(VENV)/.ready-$(LOCK)
LOCKS := requirements/torch-cpu.lock requirements/$(LOCK).lock requirements/build.txt
export OMP_NUM_THREADS ?= 1
# The project's own runs need no hub, and fail at once where something would ask it; what users serve may.
quickstart test test-all: export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all check docs format serve lock env-example sbom clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv and install the locked environment (LOCK=gpu on nodes with NVIDIA GPUs)

$(READY): $(LOCKS) pyproject.toml Makefile
	@$(PYTHON) -c '$(SUPPORTED) sys.exit("Python 3.11, 3.12 or 3.13 is needed (the lock files are for them); $(PYTHON) is %d.%d. Set PYTHON=/path/to/python3.12" % v)'
	@ls $(VENV)/.ready-* 2>/dev/null | grep -qv -- '-$(LOCK)$$' && rm -rf $(VENV) || true # of the other kind
	@echo "Installing the locked $(LOCK) environment into $(VENV) (cpu: about 2 minutes, 5 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test $(LOCK) != cpu || $(TORCH_HERE) || $(PIP) install --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) -r requirements/torch-cpu.lock 2>.pip.log || { cat .pip.log; echo "$(NO_TORCH)"; exit 1; }
	@PIP_CONSTRAINT=$(CURDIR)/requirements/build.txt $(PIP) install --no-deps --require-hashes -r requirements/$(LOCK).lock 2>.pip.log || { cat .pip.log; exit 1; }
	@$(PIP) install --no-deps --no-build-isolation -e . 2>.pip.log || { cat .pip.log; exit 1; }
	@rm -f .pip.log $(VENV)/.ready-*
	@touch $@

quickstart: setup ## Train a small model on real text, fine-tune an adapter, serve both and ask them (ARGS=--exit ends it)
	@$(BIN)/tandem quickstart $(ARGS)

# Integration tests that share a cluster and engines run in one process, all others beside them (tests/conftest.py).
SIDE_BY_SIDE ?= -n 2 --dist loadscope --no-loadscope-reorder

test: setup ## The tests that run before every change (35 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not slow and not gpu" $(SIDE_BY_SIDE) $(ARGS)

test-all: setup ## All tests but those that need a GPU
	@$(BIN)/python -m pytest -m "not gpu" $(SIDE_BY_SIDE) $(ARGS)

check: setup docs ## Lint, types, imports, duplicated code, documentation
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/duplicates.py

docs: setup ## Build the documentation site into site/; a broken link or a missing reference fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: setup ## Format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

serve: setup ## Serve the newest registered model until Ctrl-C
	@$(BIN)/tandem serve up $(ARGS)

lock: setup ## Renew requirements/*.lock (ARGS=--upgrade takes the newest versions)
	@scripts/lock $(ARGS)

env-example: ## Write .env.example from the settings in platform/tandem/settings.py
	@$(PYTHON) scripts/env_example.py

# What an image has in it, from the lock it is built from; torch's CPU build has a lock of its own.
sbom: setup ## Write software bills of materials (CycloneDX) of the CPU and the CUDA image into build/sbom/
	@scripts/sbom $(BIN) build/sbom

clean: ## Remove the environment and caches; TANDEM_HOME stays
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist site .pip.log
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
