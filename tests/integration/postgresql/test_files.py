"""`tests/unit/test_files.py` on PostgreSQL."""

from tests.unit.test_files import *  # noqa: F403 - all of it
