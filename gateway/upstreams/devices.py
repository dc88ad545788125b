"""The GPUs of this machine, each lent to one worker at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


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
        """Let `who` take devices.

        `changed` is called when another one waits for some, and when some are free for which `who` waits.
        """
        self._users[who] = changed

    def leave(self, who: object) -> None:
        """`who` takes no more devices, and waits for none."""
        self.forgo(who)
        self._users.pop(who, None)

    def take(self, number: int, who: object) -> tuple[str, ...] | None:
        """Lend `number` devices to `who`, which has joined. None if not enough are free: then `who` waits.

        Others see that it waits (`wanted_beside`), until it takes some or calls `forgo`.
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
