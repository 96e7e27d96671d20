# make help lists what there is.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
CONFIG ?= configs/tiny_moe_cpu.yaml
ARGS ?=
WORKERS ?= 3

TRAINER := .venv/.complete
SERVER := .venv-sglang/.complete
OVERLAY := .venv/megatron_core_0.19.2/.complete
# Several processes share the tests; tests/conftest.py says which belong together and which begin first.
PYTEST := .venv/bin/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder
SOURCES := megatron_minpro parallel rollout checkpoints_convert
SHELL_FILES := .ci/run $(wildcard slurm/*.sh slurm/*.sbatch)

# One thread per process: ranks and servers share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup setup-gpu train test test-slurm test-all test-faults overlay lint format docs bench bench-gpu plan-report plan-rehearsed rehearse clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "make test ARGS='tests/rollout -k port'     some of the tests; WORKERS=2 make test: in two processes, not three"
	@echo "PYTHON=python3.12 make setup               another interpreter (3.11 or 3.12)"
	@echo "make train CONFIG=my.yaml ARGS='seed=1'    another run; ARGS overrides settings of the file"

setup: $(TRAINER) $(SERVER) ## both environments: .venv (trainer, the minpro command) and .venv-sglang (rollout servers)

setup-gpu: ## both environments for NVIDIA GPUs, in place of setup (needs nvcc for TransformerEngine)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet torch==2.13.0
	.venv/bin/pip install --quiet -e '.[gpu,dev]'
	test -x .venv-sglang/bin/python || $(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/pip install --quiet sglang==0.5.23
	touch $(TRAINER) $(SERVER)

train: setup ## the main job: base model, servers, training, evaluation, plots
	.venv/bin/minpro train $(CONFIG) $(ARGS)

test: setup overlay ## all tests but the next two; real data from MINPRO_ASSETS or ../shared
	$(PYTEST) --ignore=tests/slurm -m "not faults" $(ARGS)

test-slurm: setup ## the job scripts on a throw-away Slurm on this machine (root; Debian: slurmctld slurmd slurm-client munge iproute2)
	.venv/bin/python -m pytest tests/slurm $(ARGS)

test-all: setup overlay ## test and test-slurm at the same time
	$(PYTEST) -m "not faults" $(ARGS)

test-faults: setup ## kill -9 of random processes at random moments, 20 seeds (half an hour)
	.venv/bin/python -m pytest tests/end_to_end/test_faults.py $(ARGS)

overlay: $(OVERLAY) ## a later Megatron-Core in a folder of its own, which tests/parallel/test_megatron_overlay.py lays over .venv

lint: $(TRAINER) ## ruff, mypy, import-linter, shellcheck
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo --no-cache
	.venv/bin/shellcheck --external-sources $(SHELL_FILES)

format: $(TRAINER) ## let ruff format and fix
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: $(TRAINER) ## measure: a table, and JSON in runs/benchmarks
	.venv/bin/python tests/benchmarks/run.py --out runs/benchmarks $(ARGS)

bench-gpu: $(TRAINER) ## measure on a CUDA device: parity, scan, log-probs, actor step; without one it says so
	.venv/bin/python tests/benchmarks/gpu.py --out runs/benchmarks $(ARGS)

docs: $(TRAINER) ## the reference pages that are made from the code
	.venv/bin/python -m megatron_minpro.tracking.metrics_reference
	.venv/bin/python -m megatron_minpro.config.reference

plan-report: $(TRAINER) ## the planner's predictions beside published steps: errors and a parity plot in runs/plan_report
	.venv/bin/python -m parallel.planner.accuracy runs/plan_report

rehearse: $(TRAINER) ## rehearse every layer of the production configurations without a GPU; the table of parallel/README.md
	.venv/bin/python -m megatron_minpro.commands.rehearsal_table runs/rehearsal $(ARGS)

plan-rehearsed: $(TRAINER) ## the planner's memory beside rehearsed peaks of all axes: table and parity plot in runs/rehearsal_parity
	.venv/bin/python -m megatron_minpro.cluster.rehearsal_parity runs/rehearsal_parity

clean: ## remove the environments and caches; runs/ stays
	rm -rf .venv .venv-sglang .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info

# torch first: the CPU build satisfies every later requirement, and nothing heavier is fetched in its place.
$(TRAINER): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and f"{sys.executable} is Python {sys.version.split()[0]}; expected 3.11 or 3.12: make setup PYTHON=...")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet torch==2.13.0
	.venv/bin/pip install --quiet -e '.[dev]'
	touch $@

# It declares Python 3.12 and runs on 3.11. --no-deps: everything it needs is in .venv.
$(OVERLAY): $(TRAINER)
	.venv/bin/pip install --quiet --upgrade --target $(@D) --no-deps --ignore-requires-python megatron-core==0.19.2
	touch $@

# --no-deps: SGLang's own requirements ask for CUDA packages, and for a newer torch than its CPU engine needs.
$(SERVER): rollout/requirements_cpu.txt
	test -x .venv-sglang/bin/python || $(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/pip install --quiet --upgrade pip
	.venv-sglang/bin/pip install --quiet -r rollout/requirements_cpu.txt
	.venv-sglang/bin/pip install --quiet --no-deps sglang==0.5.23
	touch $@
