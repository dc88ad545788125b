# `make` alone lists the commands. Settings come from the environment, see docs/settings.md.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; \
  done || echo python3)
ENGINE ?= cpu
MODEL   = HuggingFaceTB/SmolLM2-135M-Instruct
PY      = .venv/bin/python
INSTALL = $(PYTHON) -m scripts.install

.PHONY: help serve test unit lint lint-aws lint-kubernetes format types test-batch test-large test-criu test-image test-ray \
        soak chaos judge-vllm judge-openai \
        bench-overhead bench-gateway bench-stream bench-lambda bench-ray bench-bake bench-coldstart bench-coldstart-gpu screenshots clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: ## A model behind an OpenAI URL. PORT, API_KEY, MODEL_NAME change it; ENGINE=gpu on a GPU
	@$(INSTALL) $(ENGINE) $(if $(filter runpod,$(UPSTREAM)),runpod)
	@model=$${MODEL_NAME:-$(MODEL)}; folder=$$($(PY) -m builder fetch "$$model") || exit; \
	[ -d "$$model" ] || export SERVED_MODEL_NAME="$${SERVED_MODEL_NAME:-$${OPENAI_SERVED_MODEL_NAME_OVERRIDE:-$$model}}"; \
	unset MODEL_REVISION; MODEL_NAME=$$folder exec $(PY) -m gateway

test: ## All that CI checks: lint, types, every test
	@$(INSTALL) $(ENGINE) aws dev runpod s3 --with node npm chromium nginx postgres
	@$(MAKE) --no-print-directory lint types lint-aws lint-kubernetes
	@cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && VLLM_CACHE_ROOT=$$cache $(PY) -m pytest

unit: ## The tests that take seconds and need no engine
	@$(INSTALL) dev
	@$(PY) -m pytest -q tests/unit

lint: ## ruff, the format, and hadolint where it has a build
	@$(INSTALL) dev
	@[ ! -x .venv/bin/hadolint ] || .venv/bin/hadolint Dockerfile deploy/gateway/Dockerfile
	@$(PY) -m ruff check --quiet
	@$(PY) -m ruff format --check --quiet || { echo 'not formatted: make format' >&2; exit 1; }

lint-aws: ## template.yaml: cfn-lint, sam validate and checkov, in environments of their own
	@$(INSTALL) --tools cfn checkov
	@$(PYTHON) -m scripts.lint_aws

lint-kubernetes: ## deploy/kubernetes: each overlay rendered, held against schemas and what pods of ours keep to
	@$(INSTALL) dev
	@$(PY) -m scripts.kubernetes

format: ## Let ruff lay out the code, and fix what it can
	@$(INSTALL) dev
	@$(PY) -m ruff check --fix --quiet
	@$(PY) -m ruff format

types: ## mypy, strict
	@$(INSTALL) dev
	@$(PY) -m mypy

test-batch: ## 50,000 requests of 200 MB through a worker on batches, its memory watched; a minute
	@$(INSTALL) dev
	@$(PY) -m pytest -q tests/lanes/batch_memory.py

test-large: ## 500 MiB and 50,000 requests of 200 MB through the gateway, its memory watched; minutes
	@$(INSTALL) dev
	@$(PY) -m pytest -q -s tests/lanes/gateway_memory.py

soak: ## Waves of streams and jobs for MINUTES (10) while workers are killed and stopped, memory watched
	@$(INSTALL) dev
	@$(PY) -m tests.lanes.chaos --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

chaos: ## The same for MINUTES (5), and the gateway is killed and reloaded too
	@$(INSTALL) dev
	@$(PY) -m tests.lanes.chaos --minutes $(or $(MINUTES),5) --gateway $(if $(SEED),--seed $(SEED))

test-ray: ## Two nodes of Ray on this machine, real engines, the gateway in front; needs root, takes minutes
	@$(INSTALL) $(ENGINE) dev ray --with ip
	@$(PY) -m pytest -q tests/lanes/ray_serve.py

test-criu: ## Capture a frozen worker with CRIU (CRIU=/path/to/criu), restore copies; needs root
	@$(INSTALL) $(ENGINE) dev
	@$(PY) -m tests.lanes.criu

test-image: ## Build the image for CPUs and run it, in a Docker engine of its own; needs root, takes minutes
	@$(INSTALL) dev
	@$(PY) -m tests.lanes.image

judge-vllm: ## vLLM's own HTTP tests against our URL and against vLLM's server
	@$(INSTALL) $(ENGINE) dev judge
	@$(PY) -m judge.vllm

judge-openai: ## openai-python's own tests of its resources against our URL
	@$(INSTALL) $(ENGINE) dev judge
	@$(PY) -m judge.openai_python

bench-overhead: ## Time to first token and tokens/s beside vLLM's own server
	@$(INSTALL) $(ENGINE) dev
	@$(PY) -m bench.overhead

bench-lambda: ## What Lambda's way costs a stream, beside plain HTTP to the same worker
	@$(INSTALL) $(ENGINE) aws dev
	@$(PY) -m bench.lambda_path

bench-gateway: ## What the way through the gateway costs, beside the same worker asked straight
	@$(INSTALL) $(ENGINE) dev
	@$(PY) -m bench.gateway_path

bench-stream: ## What RunPod's way costs a stream at 30 ms, and its first token at none
	@$(INSTALL) $(ENGINE) dev runpod
	@$(PY) -m bench.stream

bench-ray: ## What a second replica of Ray Serve gives, through the gateway
	@$(INSTALL) $(ENGINE) dev ray
	@$(PY) -m bench.ray_replicas

bench-bake: ## A start from a bake, from the same model unbaked, and of vLLM's own server
	@$(INSTALL) $(ENGINE) dev
	@$(PY) -m bench.bake

bench-coldstart: ## Process start to first token beside vLLM's own server; LEVERS=1: what each lever gives
	@$(INSTALL) $(ENGINE) dev
	@$(PY) -m bench.coldstart $(if $(LEVERS),--levers)

bench-coldstart-gpu: ## The same on an NVIDIA GPU, with random weights of an 8B shape
	@[ -e /dev/nvidiactl ] || { echo 'bench-coldstart-gpu: no GPU here, /dev/nvidiactl is missing' >&2; exit 75; }
	@$(INSTALL) gpu dev
	@$(PY) -m bench.coldstart_gpu

screenshots: ## Pictures of the page for the docs, of a gateway with the default model; takes a minute
	@$(INSTALL) $(ENGINE) dev --with chromium
	@folder=$$($(PY) -m builder fetch "$(MODEL)") && \
	MODEL_NAME=$$folder SERVED_MODEL_NAME=$(MODEL) $(PY) -m scripts.screenshots

clean: ## Remove .venv, .venv-aws and what tools left; models in the user's cache folder stay
	@rm -rf .venv .venv-aws build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
