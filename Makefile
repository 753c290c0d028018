# The front door. Every target builds what it needs first; `make help` lists them.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Where vLLM goes; some other folder where it is kept between checkouts.
VLLM_VENV ?= .venv-vllm
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
          --constraint constraints.txt

# Reads the version out of an interpreter by running it: a shim on PATH may name one it has not got.
USABLE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.DEFAULT_GOAL := help
.PHONY: help demo vllm vllm-overheads vllm-env test check bench gpu proto clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

demo: $(READY) ## a real small model, cold and warm: transcript and plot in out/
	$(BIN)/kvtier demo --out out

vllm: vllm-env ## a real vLLM server, cold and warm: tables and plot in out/ (about 10 minutes)
	$(BIN)/kvtier vllm --out out --engine-python "$(VLLM_VENV)/bin/python"

vllm-overheads: vllm-env ## what kvtier costs inside vLLM, as JSON, in out/ (after make vllm)
	"$(VLLM_VENV)/bin/python" -m kvtier.bench.vllm.overheads \
	  --model out/models/SmolLM2-135M-Instruct-fp32 --out out/vllm-overheads.json
	@cat out/vllm-overheads.json

vllm-env: $(READY) ## vLLM for CPU, with kvtier, in an environment of its own (2 GB)
	scripts/install_vllm.sh "$(VLLM_VENV)" $(BIN)/python

test: $(READY) ## every test that runs on this machine; those on vLLM after `make vllm-env`
	TEST_VLLM_PYTHON="$(wildcard $(VLLM_VENV)/bin/python)" $(BIN)/python -m pytest

check: $(READY) ## format, lint, types, import contracts, generated stubs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_stubs.py --check

bench: $(READY) ## the figures of this machine, as JSON, in out/bench-*.json
	@mkdir -p out
	$(BIN)/kvtier bench transfer --json > out/bench-transfer.json
	$(BIN)/kvtier bench transfer --json --chunk-mib 5.6 > out/bench-transfer-small.json
	$(BIN)/kvtier bench transfer --json --path inline > out/bench-transfer-inline.json
	$(BIN)/kvtier bench lookup --json > out/bench-lookup.json
	$(BIN)/kvtier bench disk --json > out/bench-disk.json
	@for file in out/bench-*.json; do echo "== $$file"; cat "$$file"; echo; done

# Needs no environment of ours: only the packages, in an interpreter that has them.
GPU_PYTHON ?= python3
GPU_DEVICE ?= cuda:0

gpu: ## tests and figures of a GPU, with GPU_PYTHON; GPU_DEVICE=host is a dry run
	@"$(GPU_PYTHON)" scripts/gpu_suite.py --device "$(GPU_DEVICE)"

proto: $(READY) ## write the stubs of proto/*.proto again
	$(BIN)/python scripts/generate_stubs.py

clean: ## remove what make built
	rm -rf $(VENV) .venv-vllm out build dist *.egg-info .coverage .hypothesis .import_linter_cache \
	  .mypy_cache .pytest_cache .ruff_cache

# torch goes first and alone, so that nothing else chooses its version.
$(READY): pyproject.toml constraints.txt
	@set -e; chosen=; \
	for candidate in "$(PYTHON)" python3.11 python3.12 python3; do \
	  if "$$candidate" -c '$(USABLE)' >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "make: no working Python 3.11 or 3.12 with venv and ensurepip (Debian: python3-venv);" \
	    "name one with PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if [ -e $(BIN)/python ] && ! $(BIN)/python -c '' 2>/dev/null; then rm -rf $(VENV); fi; \
	echo "$(VENV): $$("$$chosen" --version), packages from constraints.txt"; \
	"$$chosen" -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) "$$(grep '^setuptools==' constraints.txt)"
	$(PIP) --no-build-isolation --editable '.[dev,demo]'
	@touch $@
