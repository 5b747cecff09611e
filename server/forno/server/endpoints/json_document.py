"""JSON bodies to Python values: strict, and with messages that say where."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import orjson

from forno.server.errors import InvalidArgument
from forno.server.spelling import listed, nearest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_MANY_BYTES = 65536
_GZIP = b"\x1f\x8b"
_BARE = (b"NaN", b"Infinity", b"-Infinity")


def parse(body: bytes) -> Any:
    """The value that a body stands for.

    Raises:
        InvalidArgument: It is not JSON; says at which byte. Or a key occurs twice in one object.
    """
    value = _load(body)
    refuse_repeated_keys(body, value)
    return value


def refuse_repeated_keys(body: bytes, value: Any) -> None:
    """Refuses a body in which a key occurs twice in one object, of which the reader has kept the last only.

    Each key has a colon. Where the body has no more colons than the value has keys near its top there is none
    to look for, and the slow reader that sees every key is spared.
    """
    if body.count(b":") == _key_count(value):
        return
    try:
        json.loads(body, object_pairs_hook=_object_of)
    except RecursionError:
        raise InvalidArgument("the body is not readable: its values are nested too deep") from None


def refuse_unknown(keys: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuses keys that mean nothing, with the nearest that does.

    Args:
        keys: What an object has.
        known: What it may have.
        where: Path of the object, "" for the body itself.
    """
    for key in keys:
        if key not in known:
            path = f"{where}.{key}" if where else key
            meant = nearest(key, known)
            hint = f"did you mean `{meant}`?" if meant else f"expected {listed([*known], 'or')}"
            raise InvalidArgument(f"`{path[:200]}` is unknown; {hint}", path)


def _load(body: bytes) -> Any:
    # A large body of nested lists is many containers at once, none of them garbage: the collector would walk
    # them over and over, for longer than the parsing takes.
    pause = len(body) >= _MANY_BYTES and gc.isenabled()
    if pause:
        gc.disable()
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _not_json(body, error) from None
    finally:
        if pause:
            gc.enable()


def _not_json(body: bytes, error: json.JSONDecodeError) -> InvalidArgument:
    if not body.strip():
        return InvalidArgument("the body is empty, expected JSON")
    if body.startswith(_GZIP):
        return InvalidArgument("the body is compressed with gzip, which is not read here: send it as it is")
    at = len(error.doc[: error.pos].encode(errors="surrogatepass"))
    for start in (at - 1, at):
        for word in _BARE:
            if start >= 0 and body.startswith(word, start):
                name = word.decode()
                return InvalidArgument(f'the body is not JSON: {name} at byte {start}; write it as a string: "{name}"')
    return InvalidArgument(
        f"the body is not JSON: {error.msg} at byte {at} (line {error.lineno}, column {error.colno})"
    )


def _key_count(value: Any) -> int:
    """Keys of the objects down to the fourth level of a value: where bodies have them."""
    count, level = 0, [value]
    for _ in range(4):
        below: list[Any] = []
        for item in level:
            if type(item) is dict:
                count += len(item)
                below.extend(item.values())
            elif type(item) is list and item and type(item[0]) is dict:
                below.extend(item)
        level = below
    return count


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidArgument(f"key `{twice[:200]}` occurs twice in one object", twice[:200])
    return value
