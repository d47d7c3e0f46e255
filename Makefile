# `make bench` and `make test` do their own set-up; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.installed-test
WORKERS ?= 2
LEGACY := .venv-legacy
LEGACY_PIP := $(LEGACY)/bin/python -m pip
LEGACY_PINS := methods/legacy/constraints.txt

.PHONY: bench test check format lint types imports audit-code audit fuzz faults claims long fresh \
	sweep-cost gguf legacy-env gpu-check gpu-bench clean

bench: $(INSTALLED)
	$(BIN)/python run.py -m

# Files of tests side by side; each worker computes in one thread, cells in all that there are. Not
# reordered, or files of one long test would come last, one worker waiting for the other.
test: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
		--no-loadscope-reorder

check: format lint types imports audit-code test

format: $(TESTED)
	$(BIN)/ruff format --check .

lint: $(TESTED)
	$(BIN)/ruff check .

types: $(TESTED)
	$(BIN)/mypy

imports: $(TESTED)
	$(BIN)/lint-imports

audit-code: $(TESTED)
	$(BIN)/python -m tests.audit --code

# The pinned libraries, too, where a vulnerability service can be reached.
audit: $(TESTED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[audit]'
	$(BIN)/python -m tests.audit

# A million inputs for each reader: hours; TARGETS=record takes one alone.
fuzz: $(TESTED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz.run $(TARGETS)

# Every fault in its long form, about an hour; SERIES=kill-child takes one alone.
faults: $(TESTED)
	$(BIN)/python -m tests.faults $(SERIES)

# What docs/scaling.md says of claims and of long sweeps.
claims: $(TESTED)
	$(BIN)/python -m tests.claim_simulation --workers 64 --cells 2000

long: $(TESTED)
	$(BIN)/python -m tests.long_sweep --cells 5000

# The README's two commands in a clean clone, as a user who is not root.
fresh:
	$(PYTHON) -m tests.fresh.run

# A sweep beside lm-eval's command line: make sweep-cost MODEL=FOLDER DATA=FOLDER
sweep-cost: $(TESTED)
	$(BIN)/python -m tests.peers.sweep_cost --model $(MODEL) --data $(DATA) --out runs/cost \
		--write benchmarks/cost/README.md

# On a machine with a card: nothing is installed, $(PYTHON) has torch, cuda-core and pytest. Minutes
# each. Every kernel for this card, then the tests; warnings of other versions of torch are shown only.
gpu-check:
	$(PYTHON) -m kernels.build --arch card
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PYTHON) -m pytest -W default tests/kernels
	$(PYTHON) -m kernels.bench --check --device cuda --dtype float16
	$(PYTHON) -m kernels.bench --check --device cuda --dtype bfloat16

# Single products, then a whole 7B shape; the targets at the end, also where one of both failed.
gpu-bench:
	status=0; \
	$(PYTHON) -m kernels.bench --device cuda --seconds 0.5 --minutes 4.5 || status=$$?; \
	$(PYTHON) -m harness.decode_bench --device cuda --minutes 4 || status=$$?; \
	$(PYTHON) -m kernels.bench_targets --device cuda; \
	exit $$status

clean:
	rm -rf $(VENV) $(LEGACY) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[methods,auto-round,onnx]'
	$(BIN)/python -m kernels.host_build
	touch $@

# llama.cpp is built from source: some five minutes on two cores, once (pip keeps the wheel).
gguf: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'

$(TESTED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf,dev]'
	touch $@

# The archived AutoAWQ and AutoGPTQ, which need an older transformers (methods/legacy.py).
legacy-env: $(LEGACY)/.installed

$(LEGACY)/.installed: $(LEGACY_PINS)
	$(PYTHON) -m venv $(LEGACY)
	$(LEGACY_PIP) install --quiet --constraint $(LEGACY_PINS) torch transformers autoawq setuptools wheel
	BUILD_CUDA_EXT=0 $(LEGACY_PIP) install --quiet --constraint $(LEGACY_PINS) --no-build-isolation auto-gptq peft
	$(LEGACY_PIP) uninstall --quiet --yes triton  # AutoAWQ's kernels for it do not import
	touch $@
