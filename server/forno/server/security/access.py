"""The caller of the call that runs now, and the checks of what it names.

`CURRENT` is set by the transport for each admitted call and inherited by the tasks that serve it. It is None where the
server itself asks (at start, at a reload) and where security is off; then every check passes at the cost of one look.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from forno.server.errors import FornoError, PermissionDenied, RateLimited, Unauthenticated
from forno.server.security.methods import LOOKUP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forno.server.security.rates import Bucket
    from forno.server.security.scopes import Scopes

NEVER_US = 2**62
KEY_PREFIX = "forno_"
"""What API keys begin with, and tokens do not."""

_MAX_VERDICTS = 1024
"""Names whose verdict a principal keeps. A caller chooses names, and must not choose our memory."""

MISSING = "this call needs a credential: send `x-api-key: KEY` or `authorization: Bearer KEY-OR-TOKEN`"


class Epoch:
    """The time from one change of the files that say who is who to the next.

    Args:
        look: Looks at the files, and ends this epoch if they have changed. Told the monotonic time.
        look_at_us: When it is time for that.
    """

    __slots__ = ("look", "look_at_us", "over")

    def __init__(self, look: Callable[[int], object], look_at_us: int) -> None:
        self.look = look
        self.look_at_us = look_at_us
        self.over = False


class Principal:
    """Who calls. Shared by all calls of one credential; event loop only.

    Args:
        name: Such as "key 3f9a1c2b"; for logs and limits, never sent to others.
        scopes: What it may.
        clock_us: Monotonic microseconds.
        epoch: When that was found out.
        anonymous: Whether it has shown no credential.
        expires_us: When it ends, on that clock.
        bucket: Its rate limit; None = none of its own.
    """

    def __init__(
        self,
        name: str,
        scopes: Scopes,
        clock_us: Callable[[], int],
        epoch: Epoch,
        *,
        anonymous: bool = False,
        expires_us: int = NEVER_US,
        bucket: Bucket | None = None,
    ) -> None:
        self.name = name
        self.scopes = scopes
        self.predicts = scopes.predicts
        """Whether there is any model or endpoint that it may use."""
        self.anonymous = anonymous
        self.expires_us = expires_us
        self.bucket = bucket
        self.again: Callable[[], Principal] | None = None
        """Admits its credential anew; set by the guard."""
        self._clock_us = clock_us
        self._epoch = epoch
        self._verdicts: dict[str, bool] = {}

    def may(self, right: str) -> bool:
        """Whether it has a right, such as "model/spam" or "metrics"."""
        verdict = self._verdicts.get(right)
        if verdict is None:
            verdict = self.scopes.grant(right)
            if len(self._verdicts) < _MAX_VERDICTS:
                self._verdicts[right] = verdict
        return verdict

    def may_call(self, need: str) -> bool:
        """Whether it may call methods of this need; which models or endpoints is asked where a call names them."""
        return self.predicts if need == LOOKUP else self.may(need)

    def ended(self, now_us: int) -> bool:
        """Whether it has to be found out anew who its credential stands for."""
        return self._epoch.over or now_us >= self.expires_us

    def refusal(self, what: str) -> FornoError:
        """The error for something that it may not. The same whether or not that exists."""
        return Unauthenticated(MISSING) if self.anonymous else PermissionDenied(f"this credential may not use {what}")

    def take(self, most: int) -> int:
        """Admits more calls of it, of one method, beside one that has just been.

        Args:
            most: How many there are.

        Returns:
            How many of them are within its limit.
        """
        if self.bucket is None or not most:
            return most
        try:
            return self.bucket.take(self._clock_us(), most)
        except RateLimited:
            return 0

    def next_item(self) -> Principal:
        """Admits one more item of a stream.

        Returns:
            Who calls from now on: itself, until its credential runs out or the files change.

        Raises:
            FornoError: The credential is not valid any more, or covers no models, or is over its limit.
        """
        now_us = self._clock_us()
        if now_us >= self._epoch.look_at_us and not self._epoch.over:  # there may be no calls but this one
            self._epoch.look(now_us)
        if self.ended(now_us) and self.again is not None:
            return self.again()
        if self.bucket is not None:
            self.bucket.take(now_us)
        return self


CURRENT: ContextVar[Principal | None] = ContextVar("forno_principal", default=None)


def check(kind: str, name: str) -> None:
    """Refuses a model or endpoint that the caller may not use.

    Args:
        kind: "model" or "endpoint".
        name: Its name, whether or not there is one.

    Raises:
        Unauthenticated: The caller has shown no credential.
        PermissionDenied: Its credential does not cover that.
    """
    principal = CURRENT.get()
    if principal is None:
        return
    if not principal.may(f"{kind}/{name}"):
        raise principal.refusal(f"{kind} '{name[:200]}'")


def sees(kind: str, name: str) -> bool:
    """Whether the caller may know of a model or endpoint."""
    principal = CURRENT.get()
    return principal is None or principal.may(f"{kind}/{name}")


def visible(kind: str, names: Iterable[str]) -> list[str]:
    """Those of the names that the caller may know of."""
    principal = CURRENT.get()
    return [name for name in names if principal is None or principal.may(f"{kind}/{name}")]


def next_item() -> None:
    """Admits one more item of the stream that is being served.

    Raises:
        FornoError: As `Principal.next_item`.
    """
    principal = CURRENT.get()
    if principal is not None and (now := principal.next_item()) is not principal:
        CURRENT.set(now)
