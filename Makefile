# Everything starts from a clean clone: Python 3.11 or newer and make. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
GENERATOR := $(VENV)/generator
LOWEST := $(VENV)/lowest
EXTRAS := server,images,security,telemetry,examples,dev
ADDRESS ?= 127.0.0.1:8080
AGAINST ?= main
HELM := helm.sh/helm/v3/cmd/helm@v3.22.0
SOURCES := proto server kernels clients/python
NATIVE := $(wildcard server/forno/server/transport/envoy/native/*.cc server/forno/server/transport/envoy/native/*.h)
# uv where it is installed, for speed; pip otherwise. Both read their own usual configuration.
UV := $(shell command -v uv 2>/dev/null)
pip_install = $(if $(UV),$(UV) pip install -q --python $(1)/bin/python,$(1)/bin/python -m pip install -q)
TESTS ?= tests

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help run test test-all test-install test-lowest test-tensorrt soak fuzz check deploy-tools sanitize gpu-check format proto bench install clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

run: $(STAMP)  ## serve the demo, show three calls, keep serving (ADDRESS=HOST:PORT, DEMO_EXIT=1)
	@$(BIN)/python tools/run_demo.py $(ADDRESS)

test: install  ## all tests that take seconds (TESTS=path for some of them)
	@$(BIN)/python -m pytest -q -m "not slow and not gpu" $(TESTS)

test-all: install  ## all tests, the slow ones included
	@$(BIN)/python -m pytest -q -m "not gpu" $(TESTS)

test-install: $(STAMP)  ## the wheel in a fresh environment with the newest of what it needs, serving and called
	@PYTHONPATH=. $(BIN)/python tools/try_install.py

test-tensorrt: $(STAMP)  ## what is called of TensorRT against NVIDIA's wheels of several releases; needs no GPU
	@$(BIN)/python tools/try_tensorrt.py

test-lowest: $(LOWEST)/installed  ## unit tests, and those of the wire and of telemetry, with the oldest of all that users may have
	@$(LOWEST)/bin/python -m pytest -q -m "not slow and not gpu" tests/unit $(addprefix tests/e2e/test_,predict.py rest.py otlp.py)

soak: $(STAMP)  ## only the slow tests
	@$(BIN)/python -m pytest -q -m "slow and not gpu" $(TESTS)

check: install  ## style, types, architecture, contract (AGAINST=revision to compare the contract with)
	@$(BIN)/python tools/check.py $(AGAINST)

deploy-tools: $(STAMP)  ## what `make check` reads deploy/ with, into .venv; helm needs Go, promtool comes with Prometheus
	@$(call pip_install,$(VENV)) -e '.[deploy]'
	@test -x $(BIN)/helm || ! command -v go >/dev/null || GOBIN=$(CURDIR)/$(BIN) go install $(HELM)

format: $(STAMP)  ## put every file into the house's form
	@$(BIN)/ruff check -q --fix-only .
	@$(BIN)/ruff format -q .

fuzz: $(STAMP)  ## 200,000 malformed inputs against a real server; the outcome into bench/results/fuzz.json
	@PYTHONPATH=.:tools $(BIN)/python -m tests.e2e.fuzz 200000 bench/results/fuzz.json

sanitize:  ## the native module's streams under address, undefined-behaviour and thread sanitizers
	@bash tools/sanitize.sh

gpu-check:  ## on a machine with a GPU, all that only one can show: tests, compute-sanitizer, figures
	@bash tools/gpu_check.sh

proto: install  ## generate the stubs and the transcoder's descriptor set anew
	@$(BIN)/python tools/generate.py

bench: $(STAMP)  ## measure (see bench/README.md)
	@$(BIN)/python -m bench

install: $(STAMP) $(GENERATOR)/installed  ## the virtual environment in .venv, and in it that of the generator

$(STAMP): pyproject.toml hatch_build.py tools/build_native.py $(NATIVE)
	@test -x $(BIN)/python || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Forno needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=...")' \
	  && { $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }; }
	@echo "installing into $(VENV) ..."
	@$(call pip_install,$(VENV)) $(if $(UV),--reinstall-package forno) -e '.[$(EXTRAS)]'
	@$(BIN)/python tools/build_native.py
	@$(BIN)/python -m compileall -q $(SOURCES)  # as an installer does, so that no start has to
	@touch $@

$(GENERATOR)/installed: tools/generator.txt | $(STAMP)
	@rm -rf $(GENERATOR)
	@$(BIN)/python -m venv $(if $(UV),--without-pip) $(GENERATOR)
	@$(call pip_install,$(GENERATOR)) -r tools/generator.txt
	@touch $@

$(LOWEST)/installed: pyproject.toml tools/lowest.py | $(STAMP)
	@rm -rf $(LOWEST)
	@$(BIN)/python -m venv $(LOWEST)
	@$(BIN)/python tools/lowest.py > $(LOWEST)/constraints.txt
	@FORNO_NATIVE=skip $(call pip_install,$(LOWEST)) -c $(LOWEST)/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

clean:  ## remove all that was made here
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f server/forno/server/transport/envoy/_native.*
	find proto server kernels clients tests tools bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
