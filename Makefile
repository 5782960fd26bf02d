# `make help` lists the targets. Every target that needs .venv makes it first; nothing needs root.

PYTHON ?= python3
# e.g. make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu": a torch without CUDA's gigabytes
PIP_ARGS ?=
# e.g. make demo ARGS="--devices 16 --seed 3"; make test ARGS="-k report"; make bench-NAME ARGS="--quick"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per process: many processes share the machine, and sums keep their order.
CALM := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE ORT_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-system test-aarch64 deb check format man clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with all that demo, tests and benchmarks need (again only when pyproject.toml changed)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; say e.g. make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -e '.[dev]'
	@touch $@

demo: $(STAMP) ## eight unlike devices train one model on this machine; writes demo-report/
	$(CALM) $(BIN)/liberatai demo $(ARGS)

test: $(STAMP) ## all tests but the slow ones and those of the system
	$(CALM) $(BIN)/python -m pytest -m "not slow and not system" -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: $(STAMP) ## kill and load tests
	$(CALM) $(BIN)/python -m pytest -m "slow and not system" $(ARGS)

test-system: $(STAMP) ## tests with a booted systemd, packages, other servers; skips where these are missing
	$(CALM) $(BIN)/python -m pytest -m system $(ARGS)

test-aarch64: $(STAMP) ## the devices' code on an emulated aarch64; skips where there is no emulator
	sh tests/aarch64/run.sh $(BIN)/python

deb: $(STAMP) ## Debian packages for amd64 and arm64 in dist/, the same bytes every time
	deploy/packages/build.sh --python $(abspath $(BIN))/python $(ARGS)

check: $(STAMP) ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

man: $(STAMP) ## man pages and shell completions of both programs, into build/man
	$(BIN)/python deploy/man/make.py build/man

format: $(STAMP) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-%: $(STAMP) ## one benchmark: make bench-NAME runs benchmarks/NAME.py
	$(CALM) $(BIN)/python -m benchmarks.$(subst -,_,$*) $(ARGS)

clean: ## remove .venv, caches and the demo's report
	rm -rf $(VENV) .cache .aarch64 .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-report
