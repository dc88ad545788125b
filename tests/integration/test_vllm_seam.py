"""What is used of vLLM is there: every name, every call, every attribute, one readable line each.

An upgrade that moves something fails here first, with the name, what was expected and what
was found (docs/vllm.md).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import handler
from handler.core_thread import Core, ThreadCoreClient
from handler.seam import SEAM, seam

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs an engine: make test installs it"
)

SOMETHING: Any = object()

CALLS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    # name in SEAM, attribute of it, the arguments that we give
    ("make_arg_parser", "", (SOMETHING,), {}),
    ("validate_parsed_serve_args", "", (SOMETHING,), {}),
    ("build_app", "", (SOMETHING, SOMETHING, SOMETHING), {}),
    ("init_app_state", "", (SOMETHING, SOMETHING, SOMETHING, SOMETHING), {}),
    ("AsyncEngineArgs", "from_cli_args", (SOMETHING,), {}),
    ("AsyncEngineArgs", "create_engine_config", (SOMETHING,), {"usage_context": SOMETHING}),
    (
        "AsyncLLM",
        "from_vllm_config",
        (SOMETHING,),
        {
            "usage_context": SOMETHING,
            "stat_loggers": [SOMETHING],
            "enable_log_requests": False,
            "disable_log_stats": False,
        },
    ),
    ("AsyncLLM", "get_supported_tasks", (SOMETHING,), {}),
    ("AsyncLLM", "get_num_unfinished_requests", (SOMETHING,), {}),
    ("AsyncLLM", "shutdown", (SOMETHING,), {"timeout": 1.0}),
    ("AsyncLLM", "reset_prefix_cache", (SOMETHING,), {}),
    ("AsyncLLM", "sleep", (SOMETHING,), {"level": 2}),
    ("AsyncLLM", "wake_up", (SOMETHING,), {"tags": ["weights"]}),
    ("AsyncLLM", "collective_rpc", (SOMETHING, "reload_weights"), {}),
    ("EngineCore", "", (SOMETHING, SOMETHING, True), {}),
    ("EngineDeadError", "", (), {"suppress_context": True}),
    ("ToolParserManager", "import_tool_parser", ("plugin.py",), {}),
    ("ToolParserManager", "list_registered", (), {}),
    ("ReasoningParserManager", "import_reasoning_parser", ("plugin.py",), {}),
    ("ReasoningParserManager", "list_registered", (), {}),
    ("current_platform", "is_cpu", (), {}),
]

NOT_OURS = {
    # what AsyncLLM asks of a client and the thread does not do, with the reason
    "prepare_elastic_ep": "there is one engine",
    "commit_elastic_ep": "there is one engine",
    "handle_fault": "fault tolerance is of data-parallel engines",
    "get_status": "as above",
}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what is looked at, with the warnings of libraries that nobody here can mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in SEAM:
            seam(name)


def source(thing: Any) -> ast.AST:
    """The syntax tree of a class or a function."""
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


@pytest.mark.parametrize("name", sorted(SEAM))
def test_the_name_is_there(name: str) -> None:
    """At one of its places."""
    assert seam(name) is not None


def test_every_name_is_used_and_every_use_is_named() -> None:
    """`SEAM` is the whole of what we use."""
    used = {
        node.args[0].value
        for path in Path(handler.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "seam"
        and isinstance(node.args[0], ast.Constant)
    }
    assert used == set(SEAM)


@pytest.mark.parametrize(
    ("name", "attribute", "args", "kwargs"), CALLS, ids=[f"{call[0]}.{call[1]}".strip(".") for call in CALLS]
)
def test_the_call_fits(name: str, attribute: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The signature takes what we give."""
    called = getattr(seam(name), attribute) if attribute else seam(name)
    signature = inspect.signature(called)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*("…" for _ in args), *(f"{key}=…" for key in kwargs)])
        pytest.fail(
            f"{name}{'.' if attribute else ''}{attribute}: we call ({given}), found {signature}: {error}"
        )


def test_what_we_await_is_awaitable() -> None:
    """And what we do not is not."""
    assert inspect.iscoroutinefunction(seam("init_app_state"))
    assert inspect.iscoroutinefunction(seam("AsyncLLM").get_supported_tasks)
    assert not inspect.iscoroutinefunction(seam("build_app"))
    assert not inspect.iscoroutinefunction(seam("AsyncLLM").shutdown)


def assigned(cls: Any) -> set[str]:
    """The names that a class's own `__init__` gives to `self`."""
    return {
        node.attr
        for node in ast.walk(source(cls.__init__))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }


@pytest.mark.parametrize("attribute", sorted(get_type_hints(Core)))
def test_the_core_has_the_attribute(attribute: str) -> None:
    """`Core` says what the thread reads of an `EngineCore`."""
    core = seam("EngineCore")
    found = sorted(assigned(core) | set(vars(core)))
    assert attribute in found, f"EngineCore.{attribute}: expected, found {', '.join(found)}"


@pytest.mark.parametrize(
    "method",
    sorted(name for name in vars(Core) if not name.startswith("_") and name not in get_type_hints(Core)),
)
def test_the_core_has_the_method(method: str) -> None:
    """With the parameters that `Core` says."""
    ours = list(inspect.signature(getattr(Core, method)).parameters)
    found = getattr(seam("EngineCore"), method, None)
    assert found is not None, f"EngineCore.{method}: expected, not found"
    theirs = list(inspect.signature(found).parameters)
    assert theirs == ours, f"EngineCore.{method}: expected {ours}, found {theirs}"


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (
            "vllm.v1.core.sched.interface.SchedulerInterface",
            ("has_requests", "get_request_counts", "shutdown"),
        ),
        ("vllm.v1.executor.abstract.Executor", ("shutdown",)),
        ("vllm.v1.engine.EngineCoreOutputs", ("outputs", "scheduler_stats")),
    ],
)
def test_what_the_core_holds_has_it_too(place: str, names: tuple[str, ...]) -> None:
    """Whatever scheduler or executor it is."""
    module, _, cls = place.rpartition(".")
    found = dir(getattr(importlib.import_module(module), cls))
    assert [name for name in names if name not in found] == [], f"{place}: found {', '.join(found)}"


def asked_of_the_client() -> Iterator[str]:
    """Each attribute that AsyncLLM uses of its `engine_core`."""
    for node in ast.walk(source(seam("AsyncLLM"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"self.engine_core", "engine_core"}:
            yield node.attr


def test_the_thread_answers_whatever_is_asked_of_a_client() -> None:
    """By a method of its own, or by the core's of the same name less `_async`."""
    own = set(vars(ThreadCoreClient)) | assigned(ThreadCoreClient)
    core = seam("EngineCore")
    missing = {
        name
        for name in asked_of_the_client()
        if name not in own
        and not (name.endswith("_async") and hasattr(core, name.removesuffix("_async")))
        and name not in NOT_OURS
    }
    assert not missing, f"AsyncLLM asks its client for {missing}, which ThreadCoreClient has not"
    assert set(NOT_OURS) <= set(asked_of_the_client()), "NOT_OURS names what nobody asks for any more"


def test_a_client_is_made_as_the_thread_expects() -> None:
    """AsyncLLM calls the function that we put there for the time of its making, by keyword."""
    made = [
        {keyword.arg for keyword in node.keywords}
        for node in ast.walk(source(seam("AsyncLLM").__init__))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "EngineCoreClient.make_async_mp_client"
    ]
    assert len(made) == 1, "AsyncLLM.__init__ calls EngineCoreClient.make_async_mp_client once"
    assert made[0] >= {"vllm_config", "executor_class", "log_stats"}, f"found {made[0]}"
    assert {"resources", "engine_dead"} <= {
        node.attr for node in ast.walk(source(seam("AsyncLLM"))) if isinstance(node, ast.Attribute)
    }


def test_the_output_task_is_where_death_is_seen() -> None:
    """`AsyncLLM.output_handler` is a task that ends when the engine is dead."""
    assert "output_handler" in assigned(seam("AsyncLLM"))
    assert "propagate_error" in inspect.getsource(seam("AsyncLLM")._run_output_handler)


@pytest.mark.parametrize(
    ("of", "name"),
    [("allocate_kv_cache", "torch"), ("register_kernels", "sys"), ("AsyncLLM", "renderer_from_config")],
)
def test_what_a_start_replaces_is_a_name_of_the_module(of: str, name: str) -> None:
    """Else the replacement would do nothing, and the start would be slower without a word."""
    module = sys.modules[seam(of).__module__]
    assert name in vars(module), f"{module.__name__} has no {name}: see docs/vllm.md"
