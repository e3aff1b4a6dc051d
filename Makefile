# Everything a newcomer types. Each target makes what it needs and is quick when nothing changed.
#
#   make train                       install, then pretrain the quickstart model and draw its plots (continues where it stopped)
#   make test | make test-slow       the default suite | the proofs that take minutes
#   make test-ascend                 the Ascend suite, on a software NPU, in an environment of its own
#   make test-launch                 several hosts and a real Slurm on this machine (root, Linux); names what it lacks
#   make test-launch-short           those that take seconds
#   make lint                        ruff, mypy, hadolint
#   make clean                       remove the environments, caches and the quickstart's run folder
#
# PIP_OPTIONS goes to pip as it is: make train PIP_OPTIONS="--index-url ..."; PYTHON chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/base.txt
QUICKSTART := runs/quickstart
# Much of a test is one process, or waits: as many run at once as there are cores, up to 4. A file's tests stay together.
# A process that dies ends the run: xdist (3.8) may else wait for ever for tests that it hands to nobody.
AT_ONCE := -n logical --maxprocesses 4 --dist loadfile --max-worker-restart=0
# An install is repeated only when one of these changes.
INSTALL_INPUTS := pyproject.toml $(CONSTRAINTS)
# torch_npu has an environment of its own: where CANN is missing, merely installing it breaks `import torch`, unless
# torch is told not to load it by itself.
ASCEND_VENV := .venv-ascend
ASCEND_CONSTRAINTS := constraints/ascend.txt
ASCEND_PYTHON := TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(ASCEND_VENV)/bin/python

.PHONY: help train test test-slow test-ascend test-launch test-launch-short test-matrix lint format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(VENV)/bin/python $(ASCEND_VENV)/bin/python:
	@echo "octofold: making $(@D:/bin=) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "octofold: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(@D:/bin=)

$(VENV)/.base: $(INSTALL_INPUTS) | $(VENV)/bin/python
	@echo "octofold: installing Octofold and its pinned dependencies into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.dev: $(INSTALL_INPUTS) | $(VENV)/bin/python
	@echo "octofold: installing Octofold with what its tests need into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@ $(VENV)/.base

# Without its dependencies: torch and the others are there already, in the versions that everything else is tested with.
$(ASCEND_VENV)/.dev: $(INSTALL_INPUTS) $(ASCEND_CONSTRAINTS) | $(ASCEND_VENV)/bin/python
	@echo "octofold: installing Octofold, what its tests need and torch_npu into $(ASCEND_VENV)"
	@$(ASCEND_PYTHON) -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c $(CONSTRAINTS) -e '.[dev]'
	@$(ASCEND_PYTHON) -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c $(ASCEND_CONSTRAINTS) --no-deps torch-npu
	@touch $@

train: $(VENV)/.base
	@$(BIN)/octofold train experiment=quickstart run_dir=$(QUICKSTART) resume=auto
	@$(BIN)/octofold report $(QUICKSTART)

test: $(VENV)/.dev
	@echo "octofold: running the default test suite"
	@$(BIN)/python -m pytest $(AT_ONCE)

test-slow: $(VENV)/.dev
	@echo "octofold: running the slow proofs"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 -m "slow and not ascend and not launch" -rP

test-matrix: $(VENV)/.dev
	@echo "octofold: running the rest of the matrix of layouts and resumes, more seeds and killed runs (hours)"
	@$(BIN)/python -m pytest -m matrix -rP

test-ascend: $(ASCEND_VENV)/.dev
	@echo "octofold: running the Ascend suite on a software NPU"
	@$(ASCEND_PYTHON) -m pytest -n 2 --dist loadfile --max-worker-restart=0 -m "ascend and not slow"

test-launch: $(VENV)/.dev
	@echo "octofold: running jobs over several hosts (half an hour)"
	@$(BIN)/python -m pytest -m launch

test-launch-short: $(VENV)/.dev
	@echo "octofold: running jobs over several hosts, the short proofs; what takes longer is in make test-launch"
	@$(BIN)/python -m pytest -m "launch and not slow"

lint: $(VENV)/.dev
	@echo "octofold: ruff, mypy and hadolint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint docker/*.Dockerfile

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@echo "octofold: removing $(VENV), $(ASCEND_VENV), caches and $(QUICKSTART)"
	@rm -rf $(VENV) $(ASCEND_VENV) $(QUICKSTART) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
