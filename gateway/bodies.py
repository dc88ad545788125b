"""How much the gateway holds of bodies that are on their way here, of each key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from handler.errors import RateLimited

HELD_MAX_BYTES = 128 << 20
AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Bodies:
    """Bounds what each key has on its way here, over all of its connections, to `most_bytes`.

    A body that is whole counts no more: the queue and the workers have bounds of their own.
    """

    most_bytes: int = HELD_MAX_BYTES
    _held: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def hold(self, key_id: str) -> Iterator[Callable[[int], None]]:
        """A function to be called with the size of each piece of a body, while the block runs.

        It raises `RateLimited` for the piece that is too much.
        """
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if self._held[key_id] + size > self.most_bytes:
                raise RateLimited(
                    f"Your key is sending more than {self.most_bytes} bytes at once.", retry_after_s=AGAIN_S
                )
            mine += size
            self._held[key_id] += size

        try:
            yield take
        finally:
            self._held[key_id] -= mine
            if not self._held[key_id]:
                del self._held[key_id]
