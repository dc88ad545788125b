"""RunPod's jobs over any endpoint, kept in the gateway's database.

`table` is what is written down, `claims` what runners do with it, `ledger` each step of a job's life as one
transaction. A `runner` asks an endpoint for them, each time in an `attempt`. `routes` is the API, `webhooks`
tells what came of a job.
"""

from gateway.jobs.jobs import Jobs
from gateway.jobs.runner import Asked
from gateway.jobs.table import Job, NewJob, State

__all__ = ["Asked", "Job", "Jobs", "NewJob", "State"]
