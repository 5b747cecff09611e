"""The guard: who a call comes from, whether it may come in, and how often."""

from __future__ import annotations

import contextlib
import hashlib
import time
from copy import copy
from typing import TYPE_CHECKING, Any

from forno.server.clock import clock_us as monotonic_us
from forno.server.errors import ConfigError, Unauthenticated
from forno.server.security import methods
from forno.server.security.access import KEY_PREFIX, NEVER_US, Epoch, Principal
from forno.server.security.credentials import client_of, pairs_of
from forno.server.security.exposure import is_loopback
from forno.server.security.headers import (
    ADMIN,
    API_KEY,
    AUTHORIZATION,
    CERTIFICATE,
    DOOR,
    FORWARDED_CERTIFICATE,
    PEER,
)
from forno.server.security.known import Known
from forno.server.security.rates import Bucket, Table
from forno.server.security.scopes import Scopes
from forno.server.security.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from forno.server.config import Config, SecuritySettings

LOOK_US = 1_000_000
"""How often files are looked at for changes."""

_FAILURES_PER_S, _FAILURES_BURST = 100.0, 1000  # wrong credentials of one address, checked before any signature is

_OWN = ("_epoch", "_known", "_rates", "_supervisor", "on_change")
"""What a guard keeps when it becomes another: whom it knows, what it counts, and who hears of changes."""


class Guard:
    """Admits calls. Owned by the server; event loop only; lives as long as it.

    Args:
        settings: What is asked for.
        loopback: Whether the server can be reached from its own machine alone.
        rates: Where clients' rates are counted; None = here alone.
        clock_us: Monotonic microseconds.
        time_s: Seconds since 1970.

    Raises:
        ConfigError: A file cannot be read, or a scope is none.
    """

    def __init__(
        self,
        settings: SecuritySettings,
        *,
        loopback: bool,
        rates: Table | None = None,
        clock_us: Callable[[], int] = monotonic_us,
        time_s: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._clock_us = clock_us
        self._time_s = time_s
        self._rates = rates or Table()
        self.on_change: Callable[[], None] = lambda: None
        """Called when credentials may stand for others than before: what `ask` has said holds no more."""
        self._known = Known()
        self._epoch = Epoch(self._look, 0)
        self._keys = self._tokens = None
        if settings.keys_file:
            from forno.server.security import keys  # noqa: PLC0415  (10 ms of a start that has none)

            self._find_key = keys.find
            path = settings.keys_file
            if not path.exists():
                raise ConfigError(
                    f"security.keys_file is {path}, where nothing is; make it with: "
                    f"forno keys add --file {path} --name NAME --scope predict"
                )
            self._keys = Watched((path,), lambda: keys.read(path), str(path))
        if settings.jwt.jwks_file:
            with _extra("security.jwt"):
                from forno.server.security import tokens  # noqa: PLC0415

            jwks = settings.jwt.jwks_file
            self._verify = tokens.verify
            self._tokens = Watched((jwks,), lambda: tokens.read(jwks), str(jwks))
        if settings.certificates:
            with _extra("security.certificates"):
                from forno.server.security import certificates  # noqa: PLC0415

            self._of_forwarded, self._names_in = certificates.of_forwarded, certificates.names
        self._certificates = {
            name: _scopes(texts, f"security.certificates.{name}") for name, texts in settings.certificates.items()
        }
        closed = bool(self._keys or self._tokens or self._certificates)
        self._anonymous = {
            "": _scopes(
                settings.anonymous
                if settings.anonymous is not None
                else ("health",)
                if closed
                else ("*",)
                if loopback
                else ("predict", "health", "metrics", "reflection"),
                "security.anonymous",
            ),
            ADMIN: _scopes(
                settings.admin_anonymous
                if settings.admin_anonymous is not None
                else ("*",)
                if settings.admin_address and is_loopback(settings.admin_address)
                else ("health", "metrics"),
                "security.admin_anonymous",
            ),
        }
        self._asks = closed
        self._supervisor: Principal | None = None
        self._limited = bool(settings.rate_limit.calls_per_s)

    def trust_what_no_edge_vouches_for(self) -> None:
        """Lets in whatever does not say for whom it comes: at a replica, all but the edge is the supervisor itself."""
        self._supervisor = Principal("supervisor", Scopes(("*",)), self._clock_us, self._epoch)

    def become(self, other: Guard) -> None:
        """Asks from now on for what another guard does; streams that go on ask anew at their next item."""
        kept = {name: vars(self)[name] for name in _OWN}
        vars(self).update({**vars(other), **kept})
        self._forget(self._clock_us())

    def admission(self, path: str) -> str | None:
        """What a method needs, for `admit`; None where everyone may call it, so that its calls need no look."""
        need = methods.need(path)
        if self._asks or self._limited or self._settings.admin_address:
            return need
        rights = ("model/", "endpoint/") if need == methods.LOOKUP else (need,)
        return None if all(map(self._anonymous[""].grant, rights)) else need

    def admit(self, need: str, credential: str, peer: str) -> Principal:
        """Lets a call in, or not.

        Args:
            need: What its method needs, as `admission` says.
            credential: Who calls, as `credential_of` says.
            peer: The caller's address, as the transport tells it.

        Raises:
            Unauthenticated: No credential where one is needed, or one that is not valid.
            PermissionDenied: The credential does not cover this method.
            RateLimited: The caller is over its limit.
        """
        now_us = self._clock_us()
        principal = self._entitled(need, credential, peer, now_us)
        if principal.bucket is not None:
            principal.bucket.take(now_us)
        return principal

    def knows(self, need: str, credential: str) -> bool:
        """Whether it is known by heart that a credential may call a method."""
        principal = self._remembered(credential, self._clock_us())
        return principal is not None and principal.may_call(need)

    def ask(self, need: str, credential: str, peer: str) -> bool:
        """Says of a call whose message has not come whether it may: as `admit`, which will be asked too.

        Returns:
            Whether further calls of this credential need not be asked about before they are whole.

        Raises:
            FornoError: As `admit`.
        """
        now_us = self._clock_us()
        principal = self._entitled(need, credential, peer, now_us)
        if principal.bucket is not None:
            principal.bucket.look(now_us)
        return self._known.get(credential) is not None

    def _entitled(self, need: str, credential: str, peer: str, now_us: int) -> Principal:
        """Who calls, and may call this."""
        if now_us >= self._epoch.look_at_us:
            self._look(now_us)
        principal = self._remembered(credential, now_us) or self._identify(credential, peer, now_us)
        if not principal.may_call(need):
            raise principal.refusal("models or endpoints" if need == methods.LOOKUP else f"{need} methods")
        if principal.anonymous and self._limited:
            principal = self._limited_at(principal, credential, peer)
        return principal

    def _remembered(self, credential: str, now_us: int) -> Principal | None:
        """Who calls, where that is known by heart."""
        if self._supervisor is not None and f"{PEER}\0" not in credential:
            return self._supervisor
        principal = self._known.get(credential)
        return None if principal is None or principal.ended(now_us) else principal

    def _limited_at(self, nobody: Principal, credential: str, peer: str) -> Principal:
        """A caller without a credential, as its address: what it sends on a stream counts against that one's limit."""
        limit = self._settings.rate_limit
        principal = copy(nobody)
        principal.bucket = self._bucket(f"address {client_of(credential, peer)}", limit.calls_per_s, limit.burst)
        principal.again = lambda: self.admit(methods.LOOKUP, credential, peer)
        return principal

    def _look(self, now_us: int) -> bool:
        """Forgets who is who where a file has changed; whether one has."""
        self._epoch.look_at_us = now_us + LOOK_US
        changed = [watched.refresh() for watched in (self._keys, self._tokens) if watched is not None]
        if any(changed):
            self._forget(now_us)
        return any(changed)

    def _forget(self, now_us: int) -> None:
        """Asks every caller anew, whom it knows or not."""
        self._known.clear()
        self.on_change()
        self._epoch.over = True  # streams that go on ask anew at their next item
        self._epoch = Epoch(self._look, now_us + LOOK_US)

    def _identify(self, credential: str, peer: str, now_us: int) -> Principal:
        self._known.forget(credential)
        pairs = pairs_of(credential)
        asked = self._keys or self._tokens  # otherwise it is not for us: some callers send one everywhere
        shown = [(key, value) for key, value in pairs if asked and key in (AUTHORIZATION, API_KEY)]
        door = ADMIN if (DOOR, ADMIN) in pairs else ""
        if shown:
            # Told before anything is computed: guessing and burning our time end alike.
            failures = Bucket(self._rates, f"failures {client_of(credential, peer)}", _FAILURES_PER_S, _FAILURES_BURST)
            failures.look(now_us)
            try:
                try:
                    principal = self._of_header(shown, door, now_us)
                except Unauthenticated:
                    if not self._look(now_us):  # a new key is good at once
                        raise
                    principal = self._of_header(shown, door, now_us)
            except Unauthenticated:
                failures.take(now_us)
                raise
        else:
            names = self._names(dict(pairs)) if self._certificates else ()
            principal = self._of_certificate(names, door) if names else self._nobody(door)
        principal.again = lambda: self.admit(methods.LOOKUP, credential, peer)
        self._known.add(credential, principal)
        return principal

    def _of_header(self, shown: list[tuple[str, str]], door: str, now_us: int) -> Principal:
        values = []
        for key, value in shown:
            scheme, space, rest = value.partition(" ")
            if key == AUTHORIZATION and (not space or scheme.lower() != "bearer"):
                raise Unauthenticated("the authorization is of another kind; expected `Bearer KEY-OR-TOKEN`")
            values.append(rest.strip() if key == AUTHORIZATION else value)
        if len(set(values)) > 1:
            raise Unauthenticated("there is more than one credential; expected one")
        text = values[0]
        if text.startswith(KEY_PREFIX) or self._tokens is None:
            return self._of_key(text, door, now_us)
        claims = self._verify(text, self._tokens.value, self._settings.jwt)
        name = f"token {claims.subject or hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return self._principal(name, claims.scopes, door, self._monotonic_us(claims.expires_at_s, now_us))

    def _of_key(self, text: str, door: str, now_us: int) -> Principal:
        found = self._find_key(self._keys.value, text) if self._keys else None
        if found is None:
            raise Unauthenticated("the credential is not valid")
        key_id, entry = found
        expires_us = self._monotonic_us(entry.expires_at_s, now_us)
        if expires_us <= now_us:
            raise Unauthenticated("the key has expired")
        own = (entry.calls_per_s, entry.burst) if entry.calls_per_s else None
        return self._principal(f"key {key_id}", Scopes(entry.scopes), door, expires_us, own)

    def _names(self, told: dict[str, str]) -> tuple[str, ...]:
        """The names in the certificate that the caller's connection has shown; none where it has shown none."""
        pem = told.get(CERTIFICATE) or self._of_forwarded(told.get(FORWARDED_CERTIFICATE, ""))
        return self._names_in(pem) if pem else ()

    def _of_certificate(self, names: tuple[str, ...], door: str) -> Principal:
        known = [name for name in names if name in self._certificates]
        granted = Scopes(()) if known else self._certificates.get("*", Scopes(()))
        for name in known:
            granted |= self._certificates[name]
        return self._principal(f"certificate {(known or names)[0]}", granted, door)

    def _principal(
        self, name: str, scopes: Scopes, door: str, expires_us: int = NEVER_US, own: tuple[float, int] | None = None
    ) -> Principal:
        limit = self._settings.rate_limit
        return Principal(
            name,
            self._at(door, scopes | self._anonymous[door]),
            self._clock_us,
            self._epoch,
            expires_us=expires_us,
            bucket=self._bucket(name, *(own or (limit.calls_per_s, limit.burst))),
        )

    def _bucket(self, client: str, calls_per_s: float, burst: int) -> Bucket | None:
        return Bucket(self._rates, client, calls_per_s, burst or max(1, round(calls_per_s))) if calls_per_s else None

    def _nobody(self, door: str) -> Principal:
        return Principal(
            "anonymous", self._at(door, self._anonymous[door]), self._clock_us, self._epoch, anonymous=True
        )

    def _at(self, door: str, scopes: Scopes) -> Scopes:
        """The scopes as far as this door goes: where there is an admin door, the public one leads to no such method."""
        if door == ADMIN or not self._settings.admin_address:
            return scopes
        return scopes.without(methods.ADMIN_DOOR_ONLY)

    def _monotonic_us(self, at_s: float | None, now_us: int) -> int:
        return NEVER_US if at_s is None else now_us + int(min(at_s - self._time_s(), 1e9) * 1e6)


def make(config: Config, public: str = "", rates: Path | None = None) -> Guard | None:
    """The guard that the settings ask for; None where every call may come in.

    Args:
        config: All settings.
        public: Where callers reach the server, if that is not `server.address`, as at a replica behind an edge.
        rates: The file in which the processes of a fleet count clients' rates together; None = there is one process.

    Raises:
        ConfigError: A file cannot be read, or a scope is none.
    """
    loopback = is_loopback(public or config.server.address)
    guard = Guard(config.security, loopback=loopback, rates=Table(rates) if rates else None)
    return guard if any(_asked(guard)) else None


def renew(
    current: Guard | None, before: Config, after: Config, public: str
) -> tuple[Config, Guard | None, tuple[str, ...]]:
    """A guard for new settings of a running server, which `current` can become.

    Args:
        current: The guard that it has.
        before: The settings that it has.
        after: Those that it shall have.
        public: Where callers reach it.

    Returns:
        The settings, the guard, and the names of settings that were kept: where other methods would begin or cease to
        ask their callers, which transports know from the start, security stays as it is, and there is no guard.

    Raises:
        ConfigError: A file cannot be read, or a scope is none.
    """
    fresh = make(after, public)
    if _asked(fresh) == _asked(current):
        return after, fresh, ()
    return after.model_copy(update={"security": before.security}), None, ("security",)


def _asked(guard: Guard | None) -> list[str | None]:
    """What each method asks its callers for."""
    paths = ("", *methods.NEEDS)  # "" stands for methods that are named nowhere
    return [guard.admission(path) if guard else None for path in paths]


@contextlib.contextmanager
def _extra(setting: str) -> Iterator[None]:
    """Says what to install where an import within fails."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{setting} needs {error.name}: pip install 'forno[security]'") from error


def _scopes(texts: Any, place: str) -> Scopes:
    try:
        return Scopes(texts)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
