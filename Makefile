# make help lists what there is.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
CONFIG ?= configs/tiny_moe_cpu.yaml
ARGS ?=
WORKERS ?= 4

TRAINER := .venv/.complete
SERVER := .venv-sglang/.complete
OVERLAY := .venv/megatron_core_0.19.2/.complete
TRL := .venv-trl/.complete
SGLANG := sglang==0.5.23
GPU := rollout/requirements_gpu.txt
# UV=PATH: uv installs, on a tenth of pip's CPU time. It does not read pip's settings.
UV ?=
install = $(if $(UV),$(UV) pip install --quiet --python $(1)/bin/python,$(1)/bin/pip install --quiet)
# Several processes share the tests; tests/conftest.py says which belong together and which begin first.
PYTEST := .venv/bin/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder
SOURCES := megatron_minpro parallel rollout checkpoints_convert
SHELL_FILES := .ci/run $(wildcard slurm/*.sh slurm/*.sbatch)

# One thread per process: ranks and servers share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup setup-gpu transformer-engine without-transformer-engine train test test-slurm test-all test-faults overlay lint format docs bench bench-main bench-gpu plan-report plan-rehearsed rehearse clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-26s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "make test ARGS='tests/rollout -k port'     some of the tests; WORKERS=2 make test: in two processes, not four"
	@echo "PYTHON=python3.12 make setup               another interpreter (3.11 or 3.12)"
	@echo "make train CONFIG=my.yaml ARGS='seed=1'    another run; ARGS overrides settings of the file"

setup: $(TRAINER) $(SERVER) ## both environments: .venv (trainer, the minpro command) and .venv-sglang (rollout servers)

# Trainer and servers share one torch, one NCCL and one CUDA toolkit: both installs take the same file.
setup-gpu: ## both environments for NVIDIA GPUs, in place of setup (10 GB to download, 16 GB on disk)
	$(CHECK_PYTHON)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet -r $(GPU) -e '.[dev]'
	test -x .venv-sglang/bin/python || $(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/pip install --quiet --upgrade pip
	.venv-sglang/bin/pip install --quiet -r $(GPU) $(SGLANG)
	$(call link_toolkit,.venv)
	$(call link_toolkit,.venv-sglang)
	touch .venv/.gpu .venv-sglang/.gpu $(TRAINER) $(SERVER)
	.venv/bin/minpro doctor

# The compilers of both look for lib64 and for libraries without a version in their names; the toolkit's packages have neither.
define link_toolkit
	cu=$$($(1)/bin/python -c 'import nvidia.cu13; print(nvidia.cu13.__path__[0])') && ln -sfn lib "$$cu/lib64" && \
		ln -sfn libcudart.so.13 "$$cu/lib/libcudart.so" && ln -sfn libnvrtc.so.13 "$$cu/lib/libnvrtc.so"
endef

# Its part for torch must be compiled against the torch that it runs on: not in pip's build environment, nor taken from pip's cache. The
# wheel is kept, and is installed on the next call and on other machines. Half of it installed is worse than none.
transformer-engine: ## fused layers for the trainer on GPUs, optional: one wheel in wheels/ (an hour of one core; 3 GB for each of MAX_JOBS)
	test -e .venv/.gpu || { echo "make transformer-engine: .venv is not for GPUs, expected make setup-gpu first"; exit 2; }
	.venv/bin/pip install --quiet -r $(GPU) -e '.[transformer-engine]' setuptools wheel packaging ninja pybind11 && \
		part="transformer-engine-torch==$$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("transformer-engine"))')" && \
		wheels="wheels/torch-$$(sed -n 's/^torch==//p' $(GPU))" && mkdir -p "$$wheels" && \
		PATH="$$PWD/.venv/bin:$$PATH" NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=$${MAX_JOBS:-4} \
			.venv/bin/pip wheel --no-build-isolation --no-cache-dir --no-deps --find-links "$$wheels" --wheel-dir "$$wheels" "$$part" && \
		.venv/bin/pip install --quiet -r $(GPU) --only-binary transformer-engine-torch --find-links "$$wheels" "$$part" || \
		{ $(MAKE) without-transformer-engine; echo "make transformer-engine: failed and removed again; the local layers are used"; exit 1; }

without-transformer-engine: ## remove it
	.venv/bin/pip uninstall --yes transformer-engine transformer-engine-cu12 transformer-engine-cu13 transformer-engine-torch
	rm -rf .venv/lib/python3.*/site-packages/transformer_engine # folders that pip leaves

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

bench-main: setup $(TRL) ## measure the main job against TRL, which gets an environment of its own (1.2 GB): a table, and JSON in runs/benchmarks
	.venv/bin/python tests/benchmarks/against_trl.py --trl .venv-trl/bin/python --out runs/benchmarks $(ARGS)

bench-gpu: $(TRAINER) ## measure on a CUDA device: parity, scan, log-probs, actor step; without one it says so
	.venv/bin/python tests/benchmarks/gpu.py --out runs/benchmarks $(ARGS)

docs: $(TRAINER) ## the reference pages that are made from the code
	.venv/bin/python -m megatron_minpro.tracking.metrics_reference
	.venv/bin/python -m megatron_minpro.config.reference
	.venv/bin/python -m parallel.router_reference

plan-report: $(TRAINER) ## the planner's predictions beside published steps: errors and a parity plot in runs/plan_report
	.venv/bin/python -m parallel.planner.accuracy runs/plan_report

rehearse: $(TRAINER) ## rehearse every layer of the production configurations without a GPU; the table of parallel/README.md
	.venv/bin/python -m megatron_minpro.commands.rehearsal_table runs/rehearsal $(ARGS)

plan-rehearsed: $(TRAINER) ## the planner's memory beside rehearsed peaks of all axes: table and parity plot in runs/rehearsal_parity
	.venv/bin/python -m megatron_minpro.cluster.rehearsal_parity runs/rehearsal_parity

clean: ## remove the environments and caches; runs/ stays
	rm -rf .venv .venv-sglang .venv-trl .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info

define CHECK_PYTHON
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and f"{sys.executable} is Python {sys.version.split()[0]}; expected 3.11 or 3.12: make setup PYTHON=...")'
endef

# An environment for GPUs is not made one for CPUs because a file is newer.
define not_for_gpus
	test ! -e $(1)/.gpu || { echo "$(1) is for GPUs and older than $<, expected make setup-gpu"; exit 2; }
endef

$(TRAINER): pyproject.toml
	$(CHECK_PYTHON)
	$(call not_for_gpus,.venv)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(call install,.venv) --upgrade pip
	$(call install,.venv) -e '.[cpu,dev]'
	touch $@

# It declares Python 3.12 and runs on 3.11. --no-deps: everything it needs is in .venv.
$(OVERLAY): $(TRAINER)
	.venv/bin/pip install --quiet --upgrade --target $(@D) --no-deps --ignore-requires-python megatron-core==0.19.2
	touch $@

$(TRL): tests/benchmarks/requirements_trl.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	$(call install,.venv-trl) -r $<
	touch $@

# --no-deps: SGLang's own requirements ask for CUDA packages, and for a newer torch than its CPU engine needs.
$(SERVER): rollout/requirements_cpu.txt
	$(call not_for_gpus,.venv-sglang)
	test -x .venv-sglang/bin/python || $(PYTHON) -m venv .venv-sglang
	$(call install,.venv-sglang) --upgrade pip
	$(call install,.venv-sglang) -r rollout/requirements_cpu.txt
	$(call install,.venv-sglang) --no-deps $(SGLANG)
	touch $@
