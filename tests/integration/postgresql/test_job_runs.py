"""`tests/unit/test_job_runs.py` on PostgreSQL."""

from tests.unit.test_job_runs import *  # noqa: F403 - all of it
