"""The GPUs of this machine, each lent to one worker at a time."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
_PARALLEL = {
    "tensor_parallel_size": ("--tensor-parallel-size", "-tp"),
    "pipeline_parallel_size": ("--pipeline-parallel-size", "-pp"),
    "data_parallel_size": ("--data-parallel-size", "-dp"),
}
"""vLLM's flags whose product is the number of devices of one engine."""


class Devices:
    """`ids` as `CUDA_VISIBLE_DEVICES` names them; one object for all the endpoints of a gateway."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._ids = tuple(ids)
        self._free = list(self._ids)
        self._users: dict[object, Callable[[], None]] = {}
        self._waiting: set[object] = set()

    @classmethod
    def of_machine(cls, environ: Mapping[str, str], folder: Path = Path("/dev")) -> Devices:
        """What `environ` lets this process see of NVIDIA's GPUs, all of the machine's if it does not say.

        As CUDA reads it, which counts what it sees from 0: the list ends at the first that is not there.
        """
        number = len([path for path in folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
        if (visible := environ.get(VISIBLE)) is None:
            return cls(str(index) for index in range(number))
        ids: list[str] = []
        for name in map(str.strip, visible.split(",")):
            if not name or name in ids or (re.fullmatch(r"-?\d+", name) and not 0 <= int(name) < number):
                break
            ids.append(name)
        return cls(ids if number else ())

    @property
    def total(self) -> int:
        """How many there are, lent or not."""
        return len(self._ids)

    def join(self, who: object, changed: Callable[[], None]) -> None:
        """`who` will `take`; `changed` is called when others wait for some, or it does and some are free."""
        self._users[who] = changed

    def leave(self, who: object) -> None:
        """`who` takes no more."""
        self.forgo(who)
        self._users.pop(who, None)

    def take(self, number: int, who: object) -> tuple[str, ...] | None:
        """`number` devices for `who`, which has joined; None if so many are not free: then it waits.

        Others hear of it (`wanted_beside`), until it takes some or says `forgo`.
        """
        if len(self._free) >= number:
            self.forgo(who)
            taken, self._free = tuple(self._free[:number]), self._free[number:]
            return taken
        if who not in self._waiting:
            self._waiting.add(who)
            self._tell(self._users.keys() - {who})
        return None

    def forgo(self, who: object) -> None:
        """`who` waits no more."""
        self._waiting.discard(who)

    def give_back(self, ids: Iterable[str]) -> None:
        """What was taken is free again."""
        if back := {*ids}:
            self._free = sorted(back.union(self._free), key=self._ids.index)
            self._tell(self._waiting)

    def wanted_beside(self, who: object) -> bool:
        """Whether somebody other than `who` waits for devices."""
        return bool(self._waiting - {who})

    def _tell(self, whom: Collection[object]) -> None:
        for who, changed in list(self._users.items()):
            if who in whom:
                changed()


def per_worker(environ: Mapping[str, str]) -> int:
    """How many devices an engine with the flags of `environ` has, as `handler.flags` reads them.

    A later source wins: VLLM_CONFIG_FILE, then VLLM_EXTRA_ARGS, then a name of the environment. What can't be
    read counts as 1; the worker says what is wrong with it.
    """
    number = 1
    for name, options in _PARALLEL.items():
        found = _in_file(environ.get("VLLM_CONFIG_FILE", ""), name)
        found += _in_words(environ.get("VLLM_EXTRA_ARGS", ""), options)
        found.append(environ.get(name.upper(), ""))
        sizes = [int(text) for text in map(str.strip, found) if text.isdecimal()]
        number *= max(1, sizes[-1]) if sizes else 1
    return number


def _in_file(path: str, name: str) -> list[str]:
    """A flat line of YAML will do: that is how vLLM's flags stand there."""
    with suppress(OSError):
        if path:
            pattern = rf"^\s*{name.replace('_', '[-_]')}\s*:\s*(\d+)"
            return re.findall(pattern, Path(path).read_text(errors="replace"), re.MULTILINE)
    return []


def _in_words(text: str, options: tuple[str, ...]) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError:
        return []
    found = []
    for word, following in pairwise([*words, ""]):
        option, joined, value = word.partition("=")
        if option.replace("_", "-") in options:
            found.append(value if joined else following)
    return found
