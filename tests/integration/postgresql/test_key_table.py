"""`tests/unit/test_key_table.py` on PostgreSQL."""

from tests.unit.test_key_table import *  # noqa: F403 - all of it
