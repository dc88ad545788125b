"""Flags of vLLM from the environment, checked by vLLM's own parser.

A flag comes from an environment variable in UPPER_SNAKE (MAX_MODEL_LEN=1024 is
`--max-model-len 1024`), from the words of VLLM_EXTRA_ARGS or from the YAML file of
VLLM_CONFIG_FILE; the first of these that has it wins, whole, and before vLLM's default
come the caller's. The parser is the list of what exists: nothing here names a flag that
is merely passed on, so a new vLLM brings its new flags by itself.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import shlex
from argparse import Action, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Never

from handler.errors import BadSettings
from handler.settings import Settings, rest
from handler.table import FALSE, ORDINARY, SWITCH, TRUE, nearest, ours, shown
from handler.unread import UNREAD

NEAR = 0.88
"""How alike an unknown name and a flag are before it is taken for a slip.

MAX_MODEL_LENGTH, ENABLE_PREFIX_CACHE and GPU_MEM_UTILIZATION are; of some 2,000 names
that other programs use, only `ORDINARY` are too (tests/unit/ordinary_names.txt).
"""

SETTINGS: Mapping[str, str] = {
    "api_key": "API_KEY",
    "allowed_origins": "CORS_ORIGINS",
    "chat_template": "CUSTOM_CHAT_TEMPLATE",
    "config": "VLLM_CONFIG_FILE",
    "hf_token": "HF_TOKEN",
    "host": "HOST",
    "model": "MODEL_NAME",
    "port": "PORT",
    "revision": "MODEL_REVISION",
    "served_model_name": "SERVED_MODEL_NAME",
    "shutdown_timeout": "DRAIN_TIMEOUT_S",
    "sse_keep_alive_interval": "KEEP_ALIVE_S",
    "tokenizer": "TOKENIZER_NAME",
    "uds": "UDS",
}
"""Flags (by `dest`) that are settings of ours."""

_TLS = "TLS ends in front of the worker"
_CORS = "CORS_ORIGINS is all there is to set"
_ONE = "a worker is one server of one engine"

REFUSED: Mapping[str, str] = {
    "allow_credentials": _CORS,
    "allowed_headers": _CORS,
    "allowed_methods": _CORS,
    "api_server_count": _ONE,
    "data_parallel_external_lb": _ONE,
    "data_parallel_hybrid_lb": _ONE,
    "data_parallel_multi_port_external_lb": _ONE,
    "data_parallel_supervisor_port": _ONE,
    "dp_supervisor_probe_failure_threshold": _ONE,
    "dp_supervisor_probe_interval_s": _ONE,
    "dp_supervisor_probe_timeout_s": _ONE,
    "enable_ssl_refresh": _TLS,
    "grpc": "only HTTP is served",
    "grpc_port": "only HTTP is served",
    "headless": _ONE,
    "help": "see docs/settings.md",
    "middleware": "code from the environment is not loaded",
    "root_path": "the routes are fixed",
    "ssl_ca_certs": _TLS,
    "ssl_cert_reqs": _TLS,
    "ssl_certfile": _TLS,
    "ssl_ciphers": _TLS,
    "ssl_keyfile": _TLS,
}
"""Flags (by `dest`) of vLLM's own server, which is not started, and why they are not taken."""

ALIASES: Mapping[str, str] = {
    "NUM_SPECULATIVE_TOKENS": "SPEC_TOKENS",
    "OPENAI_RESPONSE_ROLE": "RESPONSE_ROLE",
    "SPECULATIVE_METHOD": "SPEC_METHOD",
    "SPECULATIVE_MODEL": "SPEC_MODEL",
}
"""worker-vllm's names for flags that vLLM calls otherwise."""

VLLM_OWN = frozenset({"VLLM_DCP_Q_REPLICATE"})
"""What vLLM reads from the environment itself though it is `VLLM_` and the name of a flag."""

Check = Callable[[Namespace], object]


def parse_flags(
    parser: ArgumentParser, settings: Settings, *, defaults: Sequence[str] = (), checks: Iterable[Check] = ()
) -> Namespace:
    """What vLLM's `parser` makes of `settings` and of the flags in their environment.

    `defaults` are flags to set where the user has not. Each of `checks` gets the outcome
    and raises for what the parser alone can't know, such as the names of tool parsers.
    Raises `BadSettings`, which names every fault.
    """
    sources = _Sources(settings.rest, settings.vllm_extra_args, settings.vllm_config_file, defaults)
    args, faults = _read(_Vocabulary(parser), sources, engine_argv(settings), checks)
    if faults:
        raise BadSettings(faults)
    return args


def flag_faults(
    parser: ArgumentParser, environ: Mapping[str, str], *, checks: Iterable[Check] = ()
) -> tuple[str, ...]:
    """What is wrong with the flags in `environ`, whether or not its settings are right."""
    given = ours(environ)
    sources = _Sources(rest(environ), given.get("VLLM_EXTRA_ARGS"), given.get("VLLM_CONFIG_FILE"))
    return tuple(_read(_Vocabulary(parser), sources, (), checks)[1])


def named(parser: ArgumentParser, environ: Mapping[str, str]) -> set[str]:
    """The names in `environ` that are flags of vLLM's `parser`, or once were, or are worker-vllm's."""
    known = {*_Vocabulary(parser).names, *ALIASES, *UNREAD}
    return {name for name in ours(environ) if name in known}


def engine_argv(settings: Settings) -> tuple[str, ...]:
    """The settings of ours that are flags of vLLM, as words; no secret is among them."""
    given = {
        "--model": settings.model_name,
        "--revision": settings.model_revision,
        "--served-model-name": settings.model_id,
        "--tokenizer": settings.tokenizer_name,
        "--chat-template": settings.custom_chat_template,
        # An empty key, and not none: with none vLLM's application asks for VLLM_API_KEY's.
        "--api-key": "",
    }
    return tuple(f"{option}={value}" for option, value in given.items() if value is not None)


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where flags come from, the strongest first."""

    environ: Mapping[str, str]
    extra_args: str | None
    config_file: str | None
    defaults: Sequence[str] = ()


@dataclass(slots=True)
class _Flag:
    """One flag as one source gave it: `label` opens a fault, `words` are for the parser."""

    label: str
    dest: str
    words: list[str]


class _Rejected(Exception):
    pass


class _Vocabulary:
    """What a parser of vLLM knows: its flags by option and by environment name."""

    def __init__(self, parser: ArgumentParser) -> None:
        self._parser = copy.copy(parser)
        self._parser.allow_abbrev = False  # `--hos` must not get past REFUSED
        self._parser.error = self._reject  # type: ignore[method-assign] # it would exit the process
        self.options = dict[str, Action]()
        self.names = dict[str, Action]()
        for action in parser._actions:  # noqa: SLF001 - argparse has no public list of what was added
            self.options.update(dict.fromkeys(action.option_strings, action))
            for option in action.option_strings:
                negation = isinstance(action, BooleanOptionalAction) and option.startswith("--no-")
                if option.startswith("--") and not negation and action.dest != "help":
                    self.names[option[2:].replace("-", "_").upper()] = action
        self.engine_names = [
            name for name, action in self.names.items() if not {action.dest} & {*SETTINGS, *REFUSED}
        ]

    @staticmethod
    def _reject(message: str) -> Never:
        raise _Rejected(_one_line(message))

    def parse(self, words: Sequence[str]) -> Namespace:
        """What the parser makes of `words`. Raises `_Rejected`."""
        return self._parser.parse_args(words)

    def fault(self, words: Sequence[str]) -> str | None:
        """What the parser says against `words`, or None."""
        try:
            self.parse(words)
        except _Rejected as error:
            return str(error)
        return None

    def load(self, path: str) -> list[str]:
        """The words of a configuration file, by vLLM's own reader. Raises `_Rejected`."""
        try:
            words: list[str] = self._parser.load_config_file(path)  # type: ignore[attr-defined] # vLLM's has it
        except OSError as error:
            raise _Rejected(error.strerror or str(error)) from error
        except AttributeError as error:
            raise _Rejected("it is not a mapping of flags to values") from error
        except Exception as error:  # YAML's errors have no other root, and yaml is not ours to import
            raise _Rejected(_one_line(f"{type(error).__name__}: {error}")) from error
        return words


def _read(
    vllm: _Vocabulary, sources: _Sources, own: Sequence[str], checks: Iterable[Check]
) -> tuple[Namespace, list[str]]:
    faults: list[str] = []
    flags: list[_Flag] = []
    taken = set[str]()
    for layer in _layers(vllm, sources, faults):
        flags += [flag for flag in layer if flag.dest not in taken]
        taken |= {flag.dest for flag in layer}
    try:
        args = vllm.parse([*(word for flag in flags for word in flag.words), *own])
    except _Rejected as error:
        singly = [f"{flag.label}: {fault}" for flag in flags if (fault := vllm.fault(flag.words))]
        return Namespace(), [*faults, *(singly or [f"vLLM: {error}"])]
    if vars(args).get("tool_call_parser") and "enable_auto_tool_choice" not in taken:
        args.enable_auto_tool_choice = True
    if vars(args).get("enable_auto_tool_choice") and not args.tool_call_parser:
        faults.append("ENABLE_AUTO_TOOL_CHOICE needs TOOL_CALL_PARSER")
    for check in checks:
        try:
            check(args)
        except Exception as error:  # noqa: BLE001 - vLLM's checks raise KeyError, TypeError, its own: no common root
            text = error.args[0] if isinstance(error, KeyError) else error
            faults.append(f"vLLM: {_one_line(str(text))}")
    return args, faults


def _layers(vllm: _Vocabulary, sources: _Sources, faults: list[str]) -> Iterator[list[_Flag]]:
    """The flags of each source, the strongest first; what is wrong goes to `faults`."""
    yield _from_environ(vllm, sources.environ, faults)
    if sources.extra_args is not None:
        try:
            words = shlex.split(sources.extra_args)
        except ValueError as error:
            faults.append(f"VLLM_EXTRA_ARGS can't be split into words: {error}")
        else:
            yield _from_words(vllm, "VLLM_EXTRA_ARGS", words, faults)
    if sources.config_file is not None:
        try:
            words = vllm.load(sources.config_file)
        except _Rejected as error:
            faults.append(f"VLLM_CONFIG_FILE={shown(sources.config_file)} can't be read: {error}")
        else:
            yield _from_words(vllm, "VLLM_CONFIG_FILE", words, faults)
    yield _from_words(vllm, "default", sources.defaults, faults)


def _from_environ(vllm: _Vocabulary, environ: Mapping[str, str], faults: list[str]) -> list[_Flag]:
    flags: dict[str, _Flag] = {}
    for name, value in sorted(environ.items()):
        action = vllm.names.get(ALIASES.get(name, name))
        if name in UNREAD or (name, value) == ("MAX_NUM_BATCHED_TOKENS", "0"):
            continue
        if action is None:
            if flag := _slip(name, vllm.engine_names):
                faults.append(f"{name} is not a flag of vLLM; the nearest is {flag}")
        elif action.dest in SETTINGS or action.dest in REFUSED:
            faults.append(f"{name} is not taken: {_instead(action.dest)}")
        else:
            label = f"{name}={shown(value)}"
            try:
                words = _words(action, value)
            except ValueError as error:
                faults.append(f"{label} {error}")
                continue
            other = flags.setdefault(action.dest, _Flag(label, action.dest, words))
            if other.words != words:
                faults.append(f"{other.label} and {label} are one flag with different values")
    return list(flags.values())


def _words(action: Action, value: str) -> list[str]:
    """`value` of an environment variable as the parser wants it. Raises `ValueError`."""
    option = next(option for option in action.option_strings if option.startswith("--"))
    if action.nargs == 0:
        if value.lower() in TRUE:
            return [option]
        if value.lower() in FALSE:
            return [f"--no-{option[2:]}"] if isinstance(action, BooleanOptionalAction) else []
        raise ValueError(f"is not allowed; allowed: {SWITCH.allowed.replace('`', '')}")
    if action.nargs not in {"+", "*"}:
        return [f"{option}={value}"]
    if value.startswith("["):
        try:
            items = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON: {error}") from error
        return [option, *(item if isinstance(item, str) else json.dumps(item) for item in items)]
    if value.startswith("{"):
        return [option, value]
    return [option, *re.split(r"[,\s]+", value.strip(","))]


def _slip(name: str, flags: Collection[str]) -> str | None:
    """The flag that the environment name `name` was meant to be, or None."""
    bare = re.sub(r"^(VLLM|NO)_", "", name)
    if bare != name:
        return bare if bare in flags and name not in VLLM_OWN else None
    if name in ORDINARY or ("_" not in name and len(name) < 10):
        return None
    cut_short = (flag for flag in flags if "_" in name and len(name) >= 12 and flag.startswith(f"{name}_"))
    return next(cut_short, None) or nearest(name, flags, NEAR)


def _from_words(vllm: _Vocabulary, source: str, words: Sequence[str], faults: list[str]) -> list[_Flag]:
    flags: dict[str, _Flag] = {}
    for group in _groups(words):
        option, values = _option(group[0]), group[1:]
        joined = "=" in group[0] or re.fullmatch(r"-O.+", group[0]) is not None
        action = vllm.options.get(option)
        if not option.startswith("-"):
            faults.append(f"{source} begins with a value that belongs to no flag")
        elif action is None:
            near = "".join(difflib.get_close_matches(option, vllm.options, n=1, cutoff=0.8))
            faults.append(f"{source}: vLLM has no {option}" + (near and f"; the nearest is {near}"))
        elif action.dest in SETTINGS or action.dest in REFUSED:
            faults.append(f"{source}: {option} is not taken: {_instead(action.dest)}")
        elif action.dest == "trust_remote_code" and not option.startswith("--no-"):
            faults.append(f"{source}: {option} is not taken: set TRUST_REMOTE_CODE=true")
        elif action.nargs == 0 and (values or joined):
            faults.append(f"{source}: {option} takes no value")
        elif action.nargs is None and len(values) + joined != 1:
            faults.append(f"{source}: {option} takes one value")
        else:
            flag = flags.setdefault(action.dest, _Flag(source, action.dest, []))
            flag.words += group
    return list(flags.values())


def _groups(words: Sequence[str]) -> Iterator[list[str]]:
    """Each option with its values; `-1` is a value."""
    group: list[str] = []
    for word in words:
        if group and re.match(r"-[^\d\s]", word):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _option(word: str) -> str:
    """The option of `word` as the parser lists it, without value and without field.

    vLLM's parser takes `--max_model_len`, `--compilation-config.mode=3` and `-O3` too.
    """
    if word.startswith("-O"):
        return "--optimization-level"
    option = re.split(r"[=.+]", word, maxsplit=1)[0]
    return option.replace("_", "-") if option.startswith("--") else option


def _instead(dest: str) -> str:
    return f"set {SETTINGS[dest]}" if dest in SETTINGS else REFUSED[dest]


def _one_line(text: str) -> str:
    """`text` on one line, without what helps nobody: addresses of functions and of pages."""
    text = re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", text)
    text = re.sub(r"For further information visit \S+", "", text.replace("json.loads", "loads"))
    return " ".join(text.replace("converted to loads", "converted to JSON").split())
