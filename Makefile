# Everything there is to run. `make` alone lists it.
#
#   make up                       serve on one machine; ARGS are passed on: make up ARGS="--port 9000"
#   make test ARGS="-k resume"    the same for pytest, and for `make lock ARGS=--upgrade`
#   make up PYTHON=/opt/python3.12/bin/python3    the Python that builds .venv; otherwise the newest one found

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
ARGS ?=

# Every pin and hash is in the lock file, so nothing is resolved at installation (`--no-deps`).
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install dev up test check lint types floors format e2e chaos bench cover lock tools clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.runtime ## Build .venv from requirements.lock

dev: $(VENV)/.dev ## Build .venv from requirements-dev.lock: what test and check need

up: $(VENV)/.runtime ## Serve on this machine: embedded Valkey, api, worker
	@exec $(BIN)/python -m cli up $(ARGS)

test: $(VENV)/.dev $(VENV)/.node ## Run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

check: lint types floors test ## Lint, types, floors, test: what CI runs

lint: $(VENV)/.dev ## Check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev ## Check types (mypy, strict)
	$(BIN)/mypy

floors: $(VENV)/.dev ## Check who may import whom
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

e2e: $(VENV)/.dev ## Run the browser and command-line tests alone
	$(BIN)/python -m pytest tests/e2e $(ARGS)

chaos: $(VENV)/.dev ## Run the fault suite: about 25 minutes; ARGS="--quick" for a short form
	$(BIN)/python -m tests.chaos $(ARGS)

bench: $(VENV)/.dev ## Measure beside the peers: about 10 minutes; QUICK=1: one and a half
	$(BIN)/python -m bench $(if $(QUICK),--quick) $(ARGS)

cover: $(VENV)/.dev ## Run the tests with branch coverage
	$(BIN)/python -m pytest --cov=api --cov=worker --cov=shared --cov=cli --cov-branch $(ARGS)

UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header $(ARGS) pyproject.toml

lock: $(VENV)/.dev ## Write both lock files again (ARGS=--upgrade for newer versions)
	$(UV_COMPILE) --extra documents -o requirements.lock
	$(UV_COMPILE) --extra documents --extra dev -c requirements.lock -o requirements-dev.lock

# What a test needs and Python cannot install, as command:package. A test that lacks one skips, and says so.
TOOLS := nginx:nginx-light faketime:faketime chromium:chromium redis-server:redis-server node:nodejs npm:npm

tools: ## Install the optional system tools of the tests (Debian, as root)
	@set -e; packages=; \
	for tool in $(TOOLS); do \
		command -v "$${tool%%:*}" >/dev/null || packages="$$packages $${tool#*:}"; \
	done; \
	if [ -z "$$packages" ]; then echo "tools: all there"; exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "tools: missing. On Debian, as root: apt-get install$$packages"; exit 0; \
	fi; \
	policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then \
		trap "rm -f $$policy" EXIT; \
		printf '#!/bin/sh\nexit 101\n' >$$policy; chmod +x $$policy; \
	fi; \
	export DEBIAN_FRONTEND=noninteractive; failed=; \
	apt-get update -q </dev/null || echo "tools: WARNING: apt-get update failed" >&2; \
	for package in $$packages; do \
		apt-get install -q -y --no-install-recommends $$package </dev/null || failed="$$failed $$package"; \
	done; \
	if [ -n "$$failed" ]; then echo "tools: FAILED to install:$$failed" >&2; exit 1; fi

clean: ## Remove .venv and caches; the data in .rejoin stays
	rm -rf $(VENV) build *.egg-info .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The project itself is not installed: everything runs from this directory (`python -m cli`), so no build step.
# A stamp is newer than its lock file when .venv is up to date with it.

$(VENV)/.runtime: requirements.lock | $(BIN)/python
	$(PIP_INSTALL) --upgrade 'pip>=25'
	$(PIP_INSTALL) --no-deps --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.dev: requirements-dev.lock | $(BIN)/python
	$(PIP_INSTALL) --upgrade 'pip>=25'
	$(PIP_INSTALL) --no-deps --require-hashes -r requirements-dev.lock
	@touch $(VENV)/.runtime $@  # the one lock contains the other

# The Vercel AI SDK, by its lock files. Without npm (or a network) its tests skip, and say so.
AI_SDK := tests/conformance/ai_sdk/v6 tests/conformance/ai_sdk/v7

$(VENV)/.node: $(AI_SDK:%=%/package-lock.json) | $(BIN)/python
	@if ! command -v npm >/dev/null; then echo "WARNING: no npm: the tests with the AI SDK will be skipped" >&2; exit 0; fi; \
	for folder in $(AI_SDK); do \
		npm ci --prefix $$folder --no-audit --no-fund --loglevel=error </dev/null \
			|| { echo "WARNING: npm ci failed in $$folder: its tests will be skipped" >&2; exit 0; }; \
	done; \
	touch $@

# A name on the PATH may be a shim without a Python behind it, or a Python without venv: each one is tried.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python -m venv $(VENV)"; \
			$$python -m venv $(VENV) && exit 0; \
			rm -rf $(VENV); exit 1; \
		fi; \
	done; \
	echo "No usable Python 3.11 or newer among: $(or $(PYTHON),python3.13 python3.12 python3.11 python3)." >&2; \
	echo "Install one with its venv module (Debian: apt-get install python3-venv)," >&2; \
	echo "or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	exit 1
