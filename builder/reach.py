"""Whether a server can be reached, known within seconds.

Imports the standard library only: `scripts/install.py` asks before anything is installed.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from queue import Empty, SimpleQueue
from threading import Thread


def reachable(url: str, *, timeout_s: float = 3.0) -> bool:
    """Whether anything answers at `url`, through the proxies of the environment if it names any.

    Waits `timeout_s` for one address of the host and twice that in all.
    """
    # A name server that is silent, or ten addresses that are, know no timeout but a thread left behind.
    answer: SimpleQueue[bool] = SimpleQueue()
    Thread(target=lambda: answer.put(_answers(url, timeout_s)), daemon=True).start()
    try:
        return answer.get(timeout=2 * timeout_s)
    except Empty:
        return False


def _answers(url: str, timeout_s: float) -> bool:
    if not url.startswith(("http://", "https://")):
        return False
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - the scheme is checked above
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):  # noqa: S310 - as above
            return True
    except urllib.error.HTTPError as error:
        return error.code not in {407, 502, 503, 504}  # a proxy's own word, not the server's
    except urllib.error.URLError as error:
        # Somebody is there. Whom to trust is for pip and huggingface_hub to say, by settings of their own.
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    except (OSError, ValueError):
        return False
