"""Environment names that are accepted and do nothing, each with the reason.

Three kinds: knobs of RunPod's worker-vllm that its images and its Hub form still set
(its `docs/configuration.md`, `.runpod/hub.json` and the flags it lists as removed),
flags of vLLM's own HTTP server, which is not started, and names that are flags of vLLM
but so common that they mean something else on most machines. Each that is set is one
line in the log, so that an image can be changed without changing its environment first.
"""

from __future__ import annotations

from collections.abc import Mapping

_BATCHING = "tokens are sent as they are made"
_OWN_PROCESS = "the engine runs inside the worker and has no port of its own"
_GONE = "vLLM no longer has it"
_HOSTS = "a worker is one machine; use VLLM_EXTRA_ARGS if you start several by hand"
_EPLB = "it is a field of EPLB_CONFIG now"
_STRUCTURED = "set STRUCTURED_OUTPUTS_CONFIG"
_SPECULATIVE = "set SPECULATIVE_CONFIG"
_UVICORN = "vLLM's own server is not started"

WORKER_VLLM: Mapping[str, str] = {
    "BASE_PATH": "set HF_HOME to the folder that keeps downloaded models",
    "BATCH_SIZE_GROWTH_FACTOR": _BATCHING,
    "CUDA_GRAPH_SIZES": "set CUDAGRAPH_CAPTURE_SIZES",
    "DEFAULT_BATCH_SIZE": _BATCHING,
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": _BATCHING,
    "DEFAULT_MIN_BATCH_SIZE": _BATCHING,
    "DEVICE": "vLLM finds the device itself",
    "DISABLE_FRONTEND_MULTIPROCESSING": _GONE,
    "DISABLE_LOG_REQUESTS": "requests are not logged unless ENABLE_LOG_REQUESTS=true",
    "DISABLE_MM_PREPROCESSOR_CACHE": "set MM_PROCESSOR_CACHE_GB=0",
    "ENABLE_LORA_BIAS": _GONE,
    "ENABLE_MULTIMODAL_ENCODER_DATA_PARALLEL": "set MM_ENCODER_TP_MODE=data",
    "ENABLE_PROMPT_ADAPTER": _GONE,
    "EPLB_LOG_BALANCEDNESS": _EPLB,
    "EPLB_STEP_INTERVAL": _EPLB,
    "EPLB_WINDOW_SIZE": _EPLB,
    "GUIDED_DECODING_BACKEND": _STRUCTURED,
    "GUIDED_DECODING_DISABLE_ADDITIONAL_PROPERTIES": _STRUCTURED,
    "GUIDED_DECODING_DISABLE_ANY_WHITESPACE": _STRUCTURED,
    "GUIDED_DECODING_DISABLE_FALLBACK": _STRUCTURED,
    "LOGITS_PROCESSOR_PATTERN": "set LOGITS_PROCESSORS",
    "LONG_LORA_SCALING_FACTORS": _GONE,
    "LORA_EXTRA_VOCAB_SIZE": _GONE,
    "MAX_CONTEXT_LEN_TO_CAPTURE": _GONE,
    "MAX_LONG_PARTIAL_PREFILLS": _GONE,
    "MAX_NUM_PARTIAL_PREFILLS": _GONE,
    "MAX_PROMPT_ADAPTERS": _GONE,
    "MAX_PROMPT_ADAPTER_TOKEN": _GONE,
    "MAX_SEQ_LEN_TO_CAPTURE": _GONE,
    "MIN_BATCH_SIZE": _BATCHING,
    "NGRAM_PROMPT_LOOKUP_MAX": _SPECULATIVE,
    "NGRAM_PROMPT_LOOKUP_MIN": _SPECULATIVE,
    "NUM_LOOKAHEAD_SLOTS": _SPECULATIVE,
    "NUM_REDUNDANT_EXPERTS": _EPLB,
    "OVERRIDE_POOLER_CONFIG": "set POOLER_CONFIG",
    "PREEMPTION_MODE": _GONE,
    "QLORA_ADAPTER_NAME_OR_PATH": _GONE,
    "QUANTIZATION_PARAM_PATH": _GONE,
    "RAW_OPENAI_OUTPUT": "answers are always OpenAI's own bytes",
    "REQUEST_TIMEOUT": "a request runs until it ends or its client leaves",
    "ROPE_SCALING": "set HF_OVERRIDES",
    "ROPE_THETA": "set HF_OVERRIDES",
    "SCHEDULER_DELAY_FACTOR": _GONE,
    "SPECULATIVE_DISABLE_BY_BATCH_SIZE": _SPECULATIVE,
    "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE": _SPECULATIVE,
    "SPECULATIVE_MAX_MODEL_LEN": _SPECULATIVE,
    "SWAP_SPACE": _GONE,
    "TASK": "set RUNNER, and CONVERT if the model needs it",
    "TOKENIZER_POOL_EXTRA_CONFIG": _GONE,
    "TOKENIZER_POOL_SIZE": _GONE,
    "TOKENIZER_POOL_TYPE": _GONE,
    "TRANSFORMERS_VERSION": "the version is the image's",
    "USE_V2_BLOCK_MANAGER": _GONE,
    "VLLM_API_KEY": "set API_KEY",
    "VLLM_ATTENTION_BACKEND": "set ATTENTION_BACKEND",
    "VLLM_BASE_URL": _OWN_PROCESS,
    "VLLM_PORT": _OWN_PROCESS,
    "VLLM_STARTUP_TIMEOUT": "the gateway's START_TIMEOUT_S bounds a start",
    "WORKER_USE_RAY": "set DISTRIBUTED_EXECUTOR_BACKEND=ray",
}

SERVER: Mapping[str, str] = {
    "DISABLE_ACCESS_LOG_FOR_ENDPOINTS": _UVICORN,
    "DISABLE_FASTAPI_DOCS": "the pages are never reachable",
    "DISABLE_UVICORN_ACCESS_LOG": _UVICORN,
    "ENABLE_OFFLINE_DOCS": "the pages are never reachable",
    "ENABLE_REQUEST_ID_HEADERS": "every answer has an x-request-id",
    "H11_MAX_HEADER_COUNT": _UVICORN,
    "H11_MAX_INCOMPLETE_EVENT_SIZE": _UVICORN,
    "UVICORN_LOG_LEVEL": "set LOG_LEVEL",
}

COMMON: Mapping[str, str] = {
    "CONFIG": "set VLLM_CONFIG_FILE",
    "GRPC": "only HTTP is served",
    "HEADLESS": _HOSTS,
    "MASTER_ADDR": _HOSTS,
    "MASTER_PORT": _HOSTS,
    "MIDDLEWARE": "code from the environment is not loaded",
    "MODEL": "set MODEL_NAME",
    "NNODES": _HOSTS,
    "NODE_RANK": _HOSTS,
    "ROOT_PATH": "the routes are fixed",
}

UNREAD: Mapping[str, str] = {**WORKER_VLLM, **SERVER, **COMMON}
