"""Which of vLLM's HTTP tests are run, and why the others are not.

Every module of `tests/entrypoints` and `tests/tool_use` that starts a server is in one of
the two tables. What a test asserts against our contract on purpose is left out by name, on
both sides alike, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

NO_ADMIN = "asserts a route that is not reachable from outside"
NO_STORE = "asserts stored responses, which a worker that comes and goes does not keep"
OTHER_ROOT = "asserts vLLM's --root-path; the path of our URL is its own"
NO_TRITON = "needs Triton, which the CPU has not"
PATHS = "asserts that clients see folders of the server"
NO_SERVER = "touches no server, so it says the same on both sides"


@dataclass(frozen=True, slots=True)
class Module:
    """One test module. Patterns are of test names with their parameters, `[` and `]` as they are."""

    path: str
    only: Sequence[str] = ("*",)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules that are run, and a reason for each that isn't."""

    modules: Sequence[Module]
    not_run: Mapping[str, str]

    def files(self, words: Sequence[str] = ()) -> list[str]:
        """The paths of the modules, or of those whose path holds one of `words`."""
        paths = [module.path for module in self.modules]
        return [path for path in paths if not words or any(word in path for word in words)]

    def left_out(self, nodeid: str, *, touches_server: bool) -> str | None:
        """Why the test is not run, or None."""
        path, _, name = nodeid.partition("::")
        module = next((module for module in self.modules if module.path == path), None)
        if module is None:
            return "its module is not selected"
        if not touches_server:
            return NO_SERVER
        for pattern, reason in module.left_out.items():
            if matches(name, pattern):
                return reason
        if not any(matches(name, pattern) for pattern in module.only):
            return "another model of the same test"
        return None


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern`, in which only `*` is special, matches the whole of `name`."""
    return fnmatchcase(name, pattern.replace("[", "[[]"))


_OPENAI = "tests/entrypoints/openai"
_CHAT = f"{_OPENAI}/chat_completion"
_SERVE = "tests/entrypoints/serve"
_HERMES = ("*[hermes*",)

SELECTED = Selection(
    modules=(
        Module(f"{_CHAT}/test_chat.py", left_out={"test_invocations": NO_ADMIN}),
        Module(f"{_CHAT}/test_chat_completion.py"),
        Module(f"{_CHAT}/test_chat_completion_with_prompt_embeds.py"),
        Module(f"{_CHAT}/test_chat_echo.py"),
        Module(f"{_CHAT}/test_chat_logit_bias_validation.py"),
        Module(f"{_CHAT}/test_completion_with_function_calling.py", left_out={"*[watermarked-*": NO_TRITON}),
        Module(f"{_CHAT}/test_enable_force_include_usage.py"),
        Module(f"{_CHAT}/test_include_reasoning.py"),
        Module(f"{_CHAT}/test_logprob_token_ids.py"),
        # The cases with a base URL of `/llm/v1`, which is vLLM's --root-path; ours is the gateway's.
        Module(
            f"{_CHAT}/test_root_path.py", left_out={"*[test_case1]": OTHER_ROOT, "*[test_case3]": OTHER_ROOT}
        ),
        Module(f"{_CHAT}/test_thinking_token_budget.py"),
        Module(f"{_OPENAI}/completion/test_completion.py"),
        Module(f"{_OPENAI}/completion/test_completion_with_prompt_embeds.py"),
        Module(f"{_OPENAI}/completion/test_prompt_validation.py"),
        Module(f"{_OPENAI}/responses/test_basic.py"),
        Module(f"{_OPENAI}/responses/test_function_call.py"),
        Module(f"{_OPENAI}/responses/test_simple.py"),
        Module(
            f"{_OPENAI}/responses/test_stateful.py",
            left_out=dict.fromkeys(("test_store", "test_background", "test_background_cancel"), NO_STORE)
            | {"test_cancel_completed": NO_STORE},
        ),
        Module(f"{_OPENAI}/responses/test_structured_output.py"),
        Module(f"{_OPENAI}/test_chunked_prompt.py"),
        Module(f"{_OPENAI}/test_return_token_ids.py"),
        Module(f"{_OPENAI}/test_return_tokens_as_ids.py"),
        Module(
            f"{_SERVE}/instrumentator/test_basic.py",
            left_out=dict.fromkeys(("test_show_version", "test_check_health", "test_server_load*"), NO_ADMIN),
        ),
        Module(
            f"{_SERVE}/middleware/test_optional_middleware.py",
            left_out=dict.fromkeys(
                (
                    "test_no_request_id_header",
                    "test_not_v1_or_v2_path_skips_auth*",
                    "test_v2_endpoint_*",
                    "test_enable_request_id_header*",
                    "test_custom_request_id_header*",
                ),
                NO_ADMIN,
            ),
        ),
        Module(f"{_SERVE}/tokenize/test_tokenization.py", left_out={"test_tokenizer_info_*": NO_ADMIN}),
        Module("tests/entrypoints/anthropic/test_messages.py"),
        Module("tests/entrypoints/tool_parsers/test_hermes_tool_parser.py", only=("*[llama]",)),
        Module("tests/tool_use/test_chat_completions.py", only=_HERMES),
        Module("tests/tool_use/test_parallel_tool_calls.py", only=_HERMES),
        Module("tests/tool_use/test_tool_calls.py", only=_HERMES),
    ),
    not_run={
        "tests/entrypoints/multimodal/": "needs models that see or hear",
        "tests/entrypoints/speech_to_text/": "needs models that hear",
        "tests/entrypoints/pooling/": "asserts the vectors and scores of models of its own",
        "tests/entrypoints/rl/": NO_ADMIN,
        "tests/entrypoints/scale_out/": NO_ADMIN,
        "tests/entrypoints/cohere/": NO_ADMIN,
        "tests/entrypoints/generate/": NO_ADMIN,
        "tests/entrypoints/launchers/": "starts vLLM's own command in ways that only it has",
        f"{_CHAT}/test_batched_chat_completions.py": NO_ADMIN,
        f"{_CHAT}/test_extra_content_fields.py": "needs a model that sees",
        f"{_CHAT}/test_serving_chat.py": "its HTTP tests need gpt-oss-20b",
        f"{_OPENAI}/completion/test_tensorizer_entrypoint.py": "serializes a model on a GPU first",
        f"{_OPENAI}/completion/test_token_in_token_out.py": "downloads a model into a folder of its own",
        f"{_OPENAI}/models/test_models.py": PATHS,
        f"{_OPENAI}/correctness/": "measures a model's accuracy",
        f"{_OPENAI}/responses/test_harmony.py": "needs gpt-oss-20b",
        f"{_OPENAI}/responses/test_mcp_tools.py": "needs gpt-oss-20b",
        f"{_OPENAI}/responses/test_parsable_context.py": "needs a model that uses tools over several turns",
        f"{_OPENAI}/test_openai_schema.py": NO_ADMIN,
        f"{_SERVE}/dev/": NO_ADMIN,
        f"{_SERVE}/instrumentator/test_metrics.py": NO_ADMIN,
        f"{_SERVE}/instrumentator/test_orca_metrics.py": "asserts headers for a load balancer of Envoy's",
        f"{_SERVE}/instrumentator/test_uds.py": NO_ADMIN,
        f"{_SERVE}/lora/test_lora_adapters.py": NO_ADMIN,
        f"{_SERVE}/sagemaker/": NO_ADMIN,
        f"{_SERVE}/tokenize/test_tokenization_vlm.py": "needs a model that sees",
        f"{_SERVE}/tokenize/test_tokenize_then_chat_vlm.py": "needs a model that sees",
        "tests/entrypoints/tool_parsers/test_granite4_tool_parser.py": "needs a Mamba model of 7B",
        "tests/entrypoints/tool_parsers/test_openai_tool_parser.py": "needs gpt-oss-20b",
        "tests/tool_use/mistral/": "needs Mistral's tokenizer",
    },
)
