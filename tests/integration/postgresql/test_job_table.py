"""`tests/unit/test_job_table.py` on PostgreSQL."""

from tests.unit.test_job_table import *  # noqa: F403 - all of it
