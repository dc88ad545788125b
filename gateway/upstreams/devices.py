"""The GPUs of this machine, each lent to one worker at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Devices:
    """`ids` as `CUDA_VISIBLE_DEVICES` names them; one object for all the endpoints of a gateway."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._ids = tuple(ids)
        self._free = list(self._ids)
        self._waiting: dict[object, Callable[[], None]] = {}

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

    def take(self, number: int, who: object, freed: Callable[[], None]) -> tuple[str, ...] | None:
        """`number` devices; None if so many are not free: `freed` is then called each time some are.

        Until `who` takes some or says `forgo`, others hear that somebody waits (`wanted_beside`).
        """
        if len(self._free) < number:
            self._waiting[who] = freed
            return None
        self.forgo(who)
        taken, self._free = tuple(self._free[:number]), self._free[number:]
        return taken

    def forgo(self, who: object) -> None:
        """`who` waits no more."""
        self._waiting.pop(who, None)

    def give_back(self, ids: Iterable[str]) -> None:
        """What was taken is free again."""
        back = tuple(ids)
        if not back:
            return
        self._free = sorted({*self._free, *back}, key=self._ids.index)
        for freed in list(self._waiting.values()):
            freed()

    def wanted_beside(self, who: object) -> bool:
        """Whether somebody other than `who` waits for devices."""
        return bool(self._waiting.keys() - {who})
