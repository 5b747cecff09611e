"""The types of `_forno_envoy`, which exists only inside Envoy (native/module.cc)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Layout = tuple[int, int, int, int, int, int, int, int]
"""Field numbers that tell the module how to split requests and answer them (native/split.h)."""

NO_LAYOUT: Layout = (0, 0, 0, 0, 0, 0, 0, 0)
"""Requests are not split."""

JSON_LAYOUT: Layout = (1, 0, 0, 0, 0, 0, 0, 0)
"""Requests are JSON bodies, and split as such (native/json_split.h)."""

JsonSplit = tuple[bytes, tuple[int, ...], bytes]
"""Of a split JSON body: key, how many numbers are in each array, and the numbers as the bytes of doubles."""


class Call(Protocol):
    """One gRPC call that Envoy carries. Event loop only. Dropping it without a status ends the call with INTERNAL."""

    method: int
    deadline_us: int
    path: str
    content_type: str  # of an HTTP call
    peer: str
    credential: str
    gone: bool
    pending_bytes: int
    replied: bool  # whether an item was answered on the short way

    def metadata(self) -> Sequence[tuple[str, str]]:
        """The caller's headers, without those of the transport."""

    def reply(self, data: bytes, /) -> bool:
        """Answers a unary call with success; False, and nothing sent, where the message would be too large."""

    def respond(self, code: int, headers: Sequence[tuple[str, str]], body: bytes, /) -> None:
        """Answers an HTTP call with the HTTP status that stands for a gRPC code, and a JSON body."""

    def send_headers(self, pairs: Sequence[tuple[str, str]], /) -> None:
        """Sends initial metadata."""

    def send_message(self, data: bytes, compressed: bool = False, /) -> None:
        """Sends one message."""

    def send_status(self, code: int, message: str, trailers: Sequence[tuple[str, str]], /) -> None:
        """Ends the call; the message is percent-encoded."""

    def let_in(self, remember: bool, /) -> None:
        """Has the request of a caller who asked taken in; true: of its next ones unasked."""

    def consumed(self, count: int, /) -> None:
        """Says that so many bytes of the request stream have been used up."""

    def notify_writable(self) -> bool:
        """Whether a WRITABLE event will come; False where all that was sent has left."""

    def notify_items_done(self) -> bool:
        """Whether an ITEMS_DONE event will come; False where no item is on the short way."""


class Reply(Protocol):
    """A request on the short way, and the place for its answer. Event loop only.

    It is a buffer too: the request from the elements of its first tensor on. Dropping it without an answer ends the
    call with INTERNAL.
    """

    method: int
    is_item: bool
    expires_us: int  # the call's deadline, monotonic; NEVER_US without one
    request_id: str
    credential: str
    peer: str
    call: Call | None  # what it is an item of

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, parts: Sequence[Any], /) -> None:
        """Answers with a message, given in parts that are copied; the request id's field goes before the last."""

    def set_exception(self, error: BaseException, /) -> None:
        """Has the host answer with an error."""

    def end(self, code: int, message: str, trailers: Sequence[tuple[str, str]], /) -> None:
        """Ends the whole call; the message is percent-encoded."""

    def send(self, data: bytes, /) -> None:
        """Answers with a whole message."""

    def hand_over(self) -> Call | None:
        """Leaves the short way; None where the call has ended."""

    def message(self) -> bytes:
        """The whole serialized message."""

    def spans(self) -> tuple[int, ...]:
        """Offset and size of each tensor's elements, flat; offsets into the buffer."""


Event = tuple[int, Any, Any, Any]
"""Kind, call, message or None, whether that is compressed. Or HOT, method, key, Replies. Or CANCEL, method, None, False
for a call that was on the short way. Or HTTP, call, body, and a JsonSplit or None."""


class Native(Protocol):
    """The module itself."""

    CALL: int
    MESSAGE: int
    HALF_CLOSE: int
    CANCEL: int
    WRITABLE: int
    STOP: int
    ITEMS_DONE: int
    ASK: int
    HOT: int
    HTTP: int

    def serve(
        self,
        methods: list[tuple[str, bool, bool, Layout]],
        max_message_bytes: int,
        max_inbox_bytes: int,
        max_items: int,
        max_message_s: float,
        fail: Callable[[Reply, BaseException | int], None],
        /,
    ) -> int:
        """Opens the doors; the descriptor that is readable when events wait.

        Args:
            methods: Path, whether requests stream, whether callers are asked, and layout of each.
            max_message_bytes: Largest message.
            max_inbox_bytes: Of a streaming call's requests that wait, before Envoy stops reading.
            max_items: Of one streaming call that are on the short way at once.
            max_message_s: Longest time for a message of a stream to come whole.
            fail: Told of a Reply and an error, or a size that is over the limit.
        """

    def take(self) -> list[Event]:
        """All events that wait. Small answers then wait for `flush`."""

    def flush(self) -> None:
        """Lets all answers leave that were given since `take`."""

    def forget_callers(self) -> None:
        """Has every caller ask again, whether or not it was let in before."""

    def take_answered(self) -> list[tuple[int, int]]:
        """Successes of unary calls on the short way since the last time: method, how many."""

    def unanswered(self) -> list[Reply]:
        """Unary calls on the short way that have no answer yet."""
