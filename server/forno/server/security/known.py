"""What is remembered of credentials, so that each is found out once."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forno.server.security.access import Principal

MAX_KNOWN, MAX_KNOWN_CHARS = 10_000, 16 * 1024 * 1024
"""Credentials that are remembered, and the length of their texts; the oldest go first."""

MAX_CREDENTIAL_CHARS, _MAX_ANONYMOUS_CHARS = 16 * 1024, 4096
"""Of the text that stands for one, where it is remembered: what nobody has signed must not fill our memory."""


class Known:
    """Principals by the text of their credentials (see `credential_of`). Owned by the guard; event loop only."""

    def __init__(self) -> None:
        self._principals: OrderedDict[str, Principal] = OrderedDict()
        self._chars = 0
        self.get = self._principals.get

    def add(self, credential: str, principal: Principal) -> None:
        """Remembers one, in the place of what was known of it before, if it is not too long."""
        self.forget(credential)
        if len(credential) > (_MAX_ANONYMOUS_CHARS if principal.anonymous else MAX_CREDENTIAL_CHARS):
            return
        self._principals[credential] = principal
        self._chars += len(credential)
        while len(self._principals) > MAX_KNOWN or self._chars > MAX_KNOWN_CHARS:
            self.forget(next(iter(self._principals)))

    def forget(self, credential: str) -> None:
        """Forgets one, if it is there."""
        if self._principals.pop(credential, None) is not None:
            self._chars -= len(credential)

    def clear(self) -> None:
        """Forgets all."""
        self._principals.clear()
        self._chars = 0

    def __len__(self) -> int:
        return len(self._principals)
