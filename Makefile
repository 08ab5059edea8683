# Everything happens in this folder: .venv (dependencies), .quickstart (LLMCTL_HOME of `make quickstart`).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where the CPU build of torch comes from when this machine has no GPU; if it cannot be reached, the default index serves.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: quickstart test check lint bench faults clean

