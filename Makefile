# Everything happens in this folder: .venv (dependencies) and .quickstart (the LLMCTL_HOME of `make quickstart`).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch's CPU build, where this machine has no GPU. Where that index cannot be reached, plain PyPI's build serves too.
TORCH ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
QUICKSTART := $(CURDIR)/.quickstart
# Hundreds of processes of ours are started: byte code is kept, whatever the environment says of that.
unexport PYTHONDONTWRITEBYTECODE
LLMCTL := LLMCTL_HOME=$(QUICKSTART) $(BIN)/llmctl

.PHONY: quickstart test check lint bench faults clean

## One command from nothing to a trained model and its bill. A second call skips what the first prepared.
quickstart: $(VENV)/.trainer
	@mkdir -p $(QUICKSTART)
	@test -f $(QUICKSTART)/run.yaml || $(LLMCTL) init $(QUICKSTART)/run.yaml --recipe quickstart
	$(LLMCTL) launch $(QUICKSTART)/run.yaml --yes
	$(LLMCTL) fetch-checkpoint
	$(LLMCTL) sample quickstart "def main():" --tokens 200 --temperature 0.8 --seed 1
	$(LLMCTL) compare

## Style, types, layers, and every test; real SSH, real rsync where it is installed, real two-process DDP.
test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 4 --dist worksteal -q

## The quick part of it.
check: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 -q -m "not slow" tests/unit tests/simulation

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

## Measurements; results and method are in docs/performance.md.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

## The long fault harness on real processes, and many simulated schedules; writes docs/reliability.md.
faults: $(VENV)/.dev
	$(BIN)/python -m tests.faults
	$(BIN)/python -m pytest -q -m harness tests

clean:
	rm -rf $(VENV) .quickstart .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmctl needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python
	@if command -v nvidia-smi >/dev/null 2>&1; then $(PIP) install -q -c constraints.txt "torch==$(TORCH)"; else \
	  $(PIP) install -q -c constraints.txt --retries 1 --timeout 15 --extra-index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install -q -c constraints.txt "torch==$(TORCH)"; fi
	@touch $@

$(VENV)/.trainer: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e ".[trainer]"
	@touch $@

$(VENV)/.dev: $(VENV)/.trainer
	$(PIP) install -q -c constraints.txt -e ".[trainer,data,aws,wandb,dev]"
	@touch $@
