"""`tests/unit/test_batches.py` on PostgreSQL."""

from tests.unit.test_batches import *  # noqa: F403 - all of it
