"""The log: one line an event, to stderr, as `time LEVEL logger: message name=value ...`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from handler.plain import plain


def to_stderr(name: str, level: str) -> None:
    """Send what the logger `name` and those below it say, from `level` on, to stderr.

    They don't propagate: libraries (vLLM's SageMaker bootstrap is one) set the root logger's
    level as they like.
    """
    logger = logging.getLogger(name)
    logger.setLevel(level)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FieldsFormatter())
    logger.handlers = [handler]  # once, also in a fork of a process that has said so


class FieldsFormatter(logging.Formatter):
    """`time LEVEL logger: message name=value ...`, the fields being those given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """`record` and its traceback, in which a client's words may stand."""
        return plain(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """One line of `record`."""
        # Asked for each time: vLLM adds fields of its own to every record that is made.
        own = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}
        fields: Mapping[str, object] = {k: v for k, v in vars(record).items() if k not in own}
        extra = "".join(f" {name}={value!r}" for name, value in fields.items())
        return f"{self.formatTime(record)} {record.levelname} {record.name}: {record.message}{extra}"
