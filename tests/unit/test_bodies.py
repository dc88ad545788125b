"""`gateway.bodies`: what one key has the gateway hold that is not whole."""

from __future__ import annotations

import pytest

from gateway.bodies import Bodies
from handler.errors import RateLimited


def test_a_key_holds_no_more_than_its_share() -> None:
    """Over all that it sends at once; what is over is free again, other keys have shares of their own."""
    bodies = Bodies(10)
    with bodies.hold("a") as first, bodies.hold("a") as second, bodies.hold("b") as other:
        first(6)
        second(4)
        with pytest.raises(RateLimited) as refused:
            second(1)
        assert dict(refused.value.headers)["retry-after"] == "1"
        other(10)
    with bodies.hold("a") as again:
        again(10)
