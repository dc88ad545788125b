"""What can stand behind the gateway: something that answers, once it is there."""

from handler.admission import Upstream, WorkerLost

__all__ = ["Upstream", "WorkerLost"]
