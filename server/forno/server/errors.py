"""Every way a request can end badly, placed on its path.

    admit -> decode -> look up -> validate -> queue -> run -> encode
      |        |         |           |          |       |
      |        |         |           |          |       +-- EngineFailed         the run itself went wrong
      |        |         |           |          +---------- Overloaded           no room, or no chance to be in time
      |        |         |           |          +---------- DeadlineExceeded     its time ran out before it ran
      |        |         |           +--------------------- InvalidArgument      the request does not fit the signature
      |        |         +--------------------------------- NotFound, NotReady   no such model; there, but not ready
      |        |         +--------------------------------- PermissionDenied     not for this caller, there or not
      |        +------------------------------------------- InvalidArgument      not readable at all
      +---------------------------------------------------- Unauthenticated      no credential, or not a valid one
      +---------------------------------------------------- PermissionDenied     not for this caller
      +---------------------------------------------------- RateLimited          too many calls of this caller

What each becomes on the wire is decided in one table, `servicers/status.py`. `ConfigError` never reaches a caller: it
stops the start of the server.
"""

from __future__ import annotations


class FornoError(Exception):
    """Base of all errors below; its text is safe to show to a caller."""


class InvalidArgument(FornoError):
    """The request is wrong. The message says where, what was seen and what was expected.

    Args:
        message: What to tell the caller.
        field: Path of the wrong field, such as "inputs[0].shape"; empty if it is the whole request.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NotFound(FornoError):
    """No model, version, label or endpoint of that name."""


class NotReady(FornoError):
    """The model exists but cannot serve now: loading, draining or failed."""


class Overloaded(FornoError):
    """Refused without having waited.

    Args:
        message: Which limit was met.
        retry_after_s: When a place is expected to be free, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float = 0.1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The caller is over its own limit, whatever room there is."""


class Unauthenticated(FornoError):
    """The caller has shown no credential where one is needed, or one that is not valid."""


class PermissionDenied(FornoError):
    """The caller's credential does not cover this. Says nothing of whether it exists."""


class DeadlineExceeded(FornoError):
    """The caller's deadline or queue timeout passed before the request ran."""


class EngineFailed(FornoError):
    """The engine raised while running a batch; the message carries an id that is in the log, and no internals."""


class EngineLost(Exception):
    """The engine can run nothing any more: its device is of no use to this process until that starts anew.

    Never sent to a caller: who was in the run gets EngineFailed, and everybody after that NotReady.
    """


class ConfigError(FornoError):
    """The server cannot start as asked: a setting, a path or a model file is wrong. Never sent to a caller."""
