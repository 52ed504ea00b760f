# The two commands are `make run` and `make test`. Each sets up what it needs the first time; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-$(shell cat pyproject.toml constraints.txt setup.py Makefile | cksum | cut -d' ' -f1)
NATIVE := $(VENV)/.native-$(shell cat setup.py $$(find csrc -type f | LC_ALL=C sort) | cksum | cut -d' ' -f1)
# One thread a worker: two workers on two cores are faster than two threads that wait for each other.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-nightly test-all lint audit docs bench gpu clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

run: $(SETUP) $(NATIVE) ## Run the demo job; ARGS="model=... task=..." changes it
	$(BIN)/python -m runner $(ARGS)

test: $(SETUP) $(NATIVE) ## Run the fast tests
	$(PYTEST) -m "not slow and not nightly" $(ARGS)

test-slow: $(SETUP) $(NATIVE) ## Run the slow tests
	$(PYTEST) -m slow $(ARGS)

test-nightly: $(SETUP) $(NATIVE) ## Run the tests that take an hour: emulated CUDA kernels with a barrier left out, under AddressSanitizer
	$(PYTEST) -m nightly $(ARGS)

test-all: test test-slow ## Run every test

lint: $(SETUP) $(NATIVE) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(SETUP) ## Look for known vulnerabilities in dependencies and unsafe calls in the code
	.ci/audit

docs: $(SETUP) $(NATIVE) ## Generate docs/configuration.md and docs/support_matrix.md again
	$(BIN)/python -m runner.docs

bench: $(SETUP) $(NATIVE) ## Measure this machine's ceilings and the runner against them
	$(BIN)/python -m tests.bench $(ARGS)

gpu: $(SETUP) ## Build, check and time the GPU kernels; ARGS="--only attention", "--interpret" without a GPU
	$(BIN)/python -m tests.gpu $(ARGS)

clean: ## Remove what set-up and tests made; results in outputs/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis engines/*.so

# A virtual environment needs the venv module, which Debian packages apart from python3.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed; this is " + sys.version if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } \
	  || { echo "Python has no venv module: run 'sudo apt-get install python3-venv', then make again"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(SETUP): | $(BIN)/pip
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt pip setuptools wheel
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@rm -f $(VENV)/.setup-*; touch $@

$(NATIVE): $(SETUP)
	$(BIN)/python setup.py -q build_ext --inplace
	@rm -f $(VENV)/.native-*; touch $@
