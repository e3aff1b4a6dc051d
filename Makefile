# Everything a newcomer types. Each target makes what it needs and is quick when nothing changed.
#
#   make train                       install, then pretrain the quickstart model and draw its plots (continues where it stopped)
#   make test | make test-slow       the default suite | the proofs that take minutes
#   make lint                        ruff, mypy
#   make clean                       remove the environment, caches and the quickstart's run folder
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
AT_ONCE := -n logical --maxprocesses 4 --dist loadfile
# An install is repeated only when one of these changes.
INSTALL_INPUTS := pyproject.toml $(CONSTRAINTS)

.PHONY: help train test test-slow test-matrix lint format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(VENV)/bin/python:
	@echo "octofold: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "octofold: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(INSTALL_INPUTS) | $(VENV)/bin/python
	@echo "octofold: installing Octofold and its pinned dependencies into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.dev: $(INSTALL_INPUTS) | $(VENV)/bin/python
	@echo "octofold: installing Octofold with what its tests need into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@ $(VENV)/.base

train: $(VENV)/.base
	@$(BIN)/octofold train experiment=quickstart run_dir=$(QUICKSTART) resume=auto
	@$(BIN)/octofold report $(QUICKSTART)

test: $(VENV)/.dev
	@echo "octofold: running the default test suite"
	@$(BIN)/python -m pytest $(AT_ONCE)

test-slow: $(VENV)/.dev
	@echo "octofold: running the slow proofs"
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m slow -rP

test-matrix: $(VENV)/.dev
	@echo "octofold: running the whole matrix of layouts on DeepSeek-V2"
	@$(BIN)/python -m pytest -m matrix -rP

lint: $(VENV)/.dev
	@echo "octofold: ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@echo "octofold: removing $(VENV), caches and $(QUICKSTART)"
	@rm -rf $(VENV) $(QUICKSTART) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
