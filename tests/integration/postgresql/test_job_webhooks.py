"""`tests/integration/test_job_webhooks.py` on PostgreSQL."""

from tests.integration.test_job_webhooks import *  # noqa: F403 - all of it
