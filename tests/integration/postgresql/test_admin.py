"""`tests/unit/test_admin.py` on PostgreSQL."""

from tests.unit.test_admin import *  # noqa: F403 - all of it
