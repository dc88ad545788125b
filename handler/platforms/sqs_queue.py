"""A queue of SQS, for a worker that asks it: one message at a time, hidden from others while it has it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from handler.platforms.aws_clients import Clients

if TYPE_CHECKING:  # it imports AWS's models of events, for half a second
    from handler.platforms.lambda_messages import Record

THREADS = 8


@dataclass(frozen=True, slots=True)
class Times:
    """The durations of a queue's messages, in seconds."""

    wait_s: int = 5
    """How long a request for a message is held while there is none. A stop may take as long."""
    hidden_s: int = 120
    """How long a message is hidden from others; a worker that lives renews that in time."""
    again_s: int = 30
    """When a message that failed is seen again."""
    shift_s: float = 3600.0
    """How long one message may take. A batch goes on with the next: SQS hides none for more than 12 hours."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message, and its receipt handle: the queue's name for its having been given to this worker."""

    record: Record
    handle: str = field(repr=False)


class Queue:
    """The queue at `url`. Every method raises `AwsFailed`."""

    def __init__(self, url: str, clients: Clients, times: Times) -> None:
        self._url = url
        self._clients = clients
        self._threads = ThreadPoolExecutor(THREADS, "sqs")
        self.times = times

    async def has_dead_letters(self) -> bool:
        """Whether it gives a message up that fails again and again."""
        names = ["RedrivePolicy"]
        answer = await self._call("get_queue_attributes", AttributeNames=names)
        return bool(answer.get("Attributes"))

    async def receive(self) -> list[Message]:
        """The next message, if there is one before long. Nobody else sees it."""
        from handler.platforms.lambda_messages import Record  # noqa: PLC0415 - as above

        answer = await self._call(
            "receive_message",
            MaxNumberOfMessages=1,
            WaitTimeSeconds=self.times.wait_s,
            VisibilityTimeout=self.times.hidden_s,
            MessageAttributeNames=["reply_to"],
            MessageSystemAttributeNames=["MessageGroupId"],
        )
        return [
            Message(
                Record(
                    message["MessageId"],
                    message["Body"],
                    message.get("Attributes", {}).get("MessageGroupId"),
                    message.get("MessageAttributes", {}).get("reply_to", {}).get("StringValue"),
                ),
                message["ReceiptHandle"],
            )
            for message in answer.get("Messages", ())
        ]

    async def hide(self, message: Message, for_s: int) -> None:
        """Show the message to others in `for_s` seconds, not before."""
        await self._call("change_message_visibility", ReceiptHandle=message.handle, VisibilityTimeout=for_s)

    async def delete(self, message: Message) -> None:
        """It is done."""
        await self._call("delete_message", ReceiptHandle=message.handle)

    async def _call(self, operation: str, **parameters: Any) -> Any:
        call = partial(self._clients.call, "sqs", operation, QueueUrl=self._url, **parameters)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
