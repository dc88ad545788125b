"""`tests/unit/test_job_routes.py` on PostgreSQL."""

from tests.unit.test_job_routes import *  # noqa: F403 - all of it
