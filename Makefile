# Every target works as the first command after a clone: it creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULT ?= benchmarks/results/latest.json
# The versions to install; `make test CONSTRAINTS=constraints-oldest.txt VENV=.venv-oldest` tests the oldest that are claimed.
CONSTRAINTS ?= constraints.txt
export CONSTRAINTS
# The CUDA extension takes minutes to compile: .venv gets it where there is a GPU to run it or RESLORA_CUDA asks for it.
BUILD_CUDA := $(or $(RESLORA_CUDA),$(if $(wildcard /dev/nvidia0 /dev/dxg),auto,0))
REQUIREMENTS := pyproject.toml setup.py build_cuda.py build_host.py $(wildcard csrc/host*) $(CONSTRAINTS)
REQUIREMENTS += $(if $(filter-out 0,$(BUILD_CUDA)),$(wildcard csrc/*.*))
PIP := $(BIN)/python -m pip --disable-pip-version-check
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder
PIP_INSTALL := RESLORA_CUDA=$(BUILD_CUDA) $(PIP) install --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-versions mutants sweep bench convergence bench-layers bench-host gpu-check tune readme-tables lint format typecheck docs clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) --editable ".[hf,plots]"
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/.installed-demo

$(BIN)/nox: | $(BIN)/python
	$(PIP) install --constraint $(CONSTRAINTS) nox

$(BIN)/mutmut: | $(VENV)/.installed-dev
	$(PIP) install --constraint $(CONSTRAINTS) mutmut

demo: $(VENV)/.installed-demo ## Train, merge, export and compare all shortcuts on a small model; writes a report
	$(BIN)/reslora demo $(ARGS)

test: $(VENV)/.installed-dev ## Run every test that this machine can run
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(VENV)/.installed-dev ## The same without the tests marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

test-versions: $(BIN)/nox ## Quick and compile tests on the oldest and newest versions; ARGS="--session newest-3.12" for one
	$(BIN)/nox $(ARGS)

mutants: $(BIN)/mutmut ## Change the core's lines one by one and count which changes no test notices; resumable
	TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 $(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

sweep: $(VENV)/.installed-dev ## Small models of many architectures against the equations; writes benchmarks/results/sweep.md
	$(BIN)/python -m pytest tests/sweep -m sweep --sweep-table=benchmarks/results/sweep.md $(ARGS)

bench: $(VENV)/.installed-dev ## Measure layers and models against their peers on this machine; ARGS=--quick for the short of it
	$(BIN)/reslora bench $(ARGS)
	$(BIN)/python -m benchmarks.convergence run --set quick --jobs 2 --out build/convergence-quick

convergence: $(VENV)/.installed-dev ## The paper's experiments on small models, five seeds each; ARGS="--tasks python" for a part; resumable
	$(BIN)/python -m benchmarks.convergence run --set cpu --jobs 2 --out build/convergence $(ARGS)

bench-host: $(VENV)/.installed-dev ## Measure what a layer call costs beside its arithmetic; writes benchmarks/results and the tables
	OMP_NUM_THREADS=1 $(BIN)/reslora bench --set host --out benchmarks/results/host-cpu-$$(date -u +%F).json $(ARGS)
	$(BIN)/python -m benchmarks.tables --pages README.md docs/measured.md docs/howto/choose-a-shortcut.md

bench-layers: $(VENV)/.installed-dev ## Time the layers under pytest-benchmark, for its own compare tools
	$(BIN)/python -m pytest benchmarks/kernels --benchmark-json=$(RESULT) $(ARGS)
	$(BIN)/python -m benchmarks.tables $(RESULT)

readme-tables: $(VENV)/.installed-dev ## Write the tables of README.md and docs/ from the newest committed results
	$(BIN)/python -m benchmarks.tables --pages README.md docs/measured.md docs/howto/choose-a-shortcut.md

gpu-check: ## On a CUDA GPU: tests on the chip, compute-sanitizer, then speed; RESLORA_PYTHON picks an interpreter
	@test -n "$(RESLORA_PYTHON)" || $(MAKE) --no-print-directory $(VENV)/.installed-dev
	$(or $(RESLORA_PYTHON),$(BIN)/python) -m benchmarks.gpu_check $(ARGS)

tune: ## On a CUDA GPU: time every form and tile, and write the table that the choice reads
	@test -n "$(RESLORA_PYTHON)" || $(MAKE) --no-print-directory $(VENV)/.installed-dev
	$(or $(RESLORA_PYTHON),$(BIN)/python) -m benchmarks.gpu_check --part tune $(ARGS)

lint: $(VENV)/.installed-dev ## ruff: rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed-dev ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(VENV)/.installed-dev ## mypy, strict on the package
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## Build the documentation in build/docs; `.venv/bin/mkdocs serve` shows it while it is written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean: ## Remove .venv and everything that was generated
	rm -rf $(VENV) build dist *.egg-info reslora_kernels/_build_info.py reslora_kernels/_cuda*.so reslora_kernels/_host*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
