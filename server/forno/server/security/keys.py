"""API keys: made once, shown once, kept as hashes in a file that may change at any time.

A key is `forno_ID_SECRET`: an id of 32 bits to find its entry by, and a secret of 256 random bits. A hash without salt
and without a slow function is right for such a secret: there is nothing to guess, and no two keys are equal.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from forno.server.config import Settings
from forno.server.errors import ConfigError
from forno.server.security.access import KEY_PREFIX
from forno.server.security.scopes import Scopes
from forno.server.settings.loading import load_document

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_UNKNOWN = hashlib.sha256(secrets.token_bytes(32)).hexdigest()  # compared with where there is no such id
_HEADING = """\
# API keys of Forno, made and removed by `forno keys`. Only hashes stand here; a running server notices changes.
keys:
"""


class Key(Settings):
    """An entry of the keys file."""

    name: str
    """Whose it is, for people."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the whole key, in hexadecimal."""
    scopes: tuple[str, ...]
    """What it may (scopes.py)."""
    created: str = ""
    """When it was made; for people."""
    expires: str = ""
    """Until when it is good: a date (its beginning) or time of ISO 8601, UTC if it does not say; empty = for ever."""
    calls_per_s: Annotated[float, Field(strict=True, ge=0, le=1e9)] = 0.0
    """A rate limit of its own in place of `security.rate_limit`; 0 = that one."""
    burst: Annotated[int, Field(strict=True, ge=0, le=10**9)] = 0
    """Calls that may come at once; 0 = those of one second."""

    @field_validator("scopes")
    @classmethod
    def _known(cls, scopes: tuple[str, ...]) -> tuple[str, ...]:
        Scopes(scopes)
        return scopes

    @field_validator("expires")
    @classmethod
    def _time(cls, expires: str) -> str:
        if expires:
            _parse_time(expires)
        return expires

    @property
    def expires_at_s(self) -> float | None:
        """Until when it is good, in seconds since 1970; None = for ever."""
        return _parse_time(self.expires).timestamp() if self.expires else None


class KeysFile(Settings):
    """The keys file."""

    keys: dict[str, Key]
    """Id -> entry."""


def read(path: Path) -> dict[str, Key]:
    """The entries of a keys file, by id.

    Raises:
        ConfigError: It cannot be read, or an entry is wrong; one line for each fault.
    """
    return load_document(path, KeysFile).keys


def find(keys: Mapping[str, Key], presented: str) -> tuple[str, Key] | None:
    """The id and entry of a key that a caller has shown; None where it is none of them. Takes as long either way.

    Args:
        keys: The entries.
        presented: What was sent.
    """
    key_id, _, _ = presented.removeprefix(KEY_PREFIX).partition("_")
    entry = keys.get(key_id)
    digest = hashlib.sha256(presented.encode(errors="replace")).hexdigest()
    same = hmac.compare_digest(digest, entry.sha256 if entry else _UNKNOWN)
    return (key_id, entry) if same and entry else None


def add(path: Path, name: str, scopes: Sequence[str], **more: Any) -> str:
    """Makes a key and adds its entry to a file, which is made where there is none.

    Args:
        path: The keys file.
        name: Whose it is.
        scopes: What it may.
        more: Other fields of `Key`.

    Returns:
        The key, which is kept nowhere.

    Raises:
        ConfigError: The file cannot be read or written.
        ValueError: A field is wrong (pydantic's error is one).
    """
    with _changing(path) as entries:
        key_id = secrets.token_hex(4)
        while key_id in entries:
            key_id = secrets.token_hex(4)
        key = f"{KEY_PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
        created = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        digest = hashlib.sha256(key.encode()).hexdigest()
        entries[key_id] = Key(name=name, sha256=digest, scopes=tuple(scopes), created=created, **more)
    return key


def remove(path: Path, which: str) -> list[str]:
    """Takes keys out of a file.

    Args:
        path: The keys file.
        which: An id, or the name of one or more keys.

    Returns:
        The ids that are gone; empty where none was meant.

    Raises:
        ConfigError: The file cannot be read or written.
    """
    with _changing(path) as entries:
        gone = [key_id for key_id, entry in entries.items() if which in (key_id, entry.name)]
        for key_id in gone:
            del entries[key_id]
    return gone


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[dict[str, Key]]:
    """The entries of a file, written back at the end, whole or not at all; one at a time may do that."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # of the folder: the file itself is replaced
            there = path.exists()
            entries = dict(read(path)) if there else {}
            yield entries
            lines = [
                f"  {json.dumps(key_id)}: {json.dumps(entry.model_dump(exclude_unset=True))}\n"
                for key_id, entry in entries.items()
            ]
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
                new.write(_HEADING + "".join(lines))  # mode 0600: tempfile's own
            if there:
                shutil.copymode(path, new.name)
            Path(new.name).replace(path)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def _parse_time(text: str) -> dt.datetime:
    try:
        time = dt.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("a date or time such as 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return time if time.tzinfo else time.replace(tzinfo=dt.UTC)
