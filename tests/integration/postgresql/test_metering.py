"""`tests/unit/test_metering.py` on PostgreSQL."""

from tests.unit.test_metering import *  # noqa: F403 - all of it
