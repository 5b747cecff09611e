"""What the settings tree looks like: which keys lead where, and what each takes, in words."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server.config import Settings
from forno.server.spelling import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def section(annotation: Any) -> type[Settings] | None:
    """The settings class that an annotation names, or None."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def entries(annotation: Any) -> Any:
    """The annotation of what a `dict[str, ...]` holds, or None where it is no dict."""
    return typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None


def below(annotation: Any, key: str) -> Any:
    """The annotation of what stands under `key`, or None where nothing may."""
    found = section(annotation)
    if found is not None:
        return found.model_fields[key].annotation if key in found.model_fields else None
    return entries(annotation)


def paths(settings: type[Settings], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every setting below, section by section, without those under a name of the user's."""
    for key, field in settings.model_fields.items():
        yield (*prefix, key)
        found = section(field.annotation)
        if found is not None:
            yield from paths(found, (*prefix, key))


def expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a setting takes, such as "a whole number from 1 to 256"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return expected(arguments[0], _flat(arguments[1:]))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(expected(part) for part in arguments if part is not types.NoneType)
    if origin is typing.Literal:
        return listed([str(value) for value in arguments], "or")
    if origin is tuple:
        return f"a list such as [{'-1, 64' if _is_number(arguments[0]) else 'a, b'}]"
    if origin is dict or section(annotation) is not None:
        return "a mapping of `name: value`"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(metadata)
    return {bool: "true or false", Path: "a path"}.get(annotation, "a text")


def _range(metadata: Sequence[Any]) -> str:
    low = next((item.ge for item in metadata if hasattr(item, "ge")), None)
    high = next((item.le for item in metadata if hasattr(item, "le")), None)
    if low is None:
        return ""
    return f" of {low} or more" if high is None else f" from {low} to {high}"


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Limits of nested `Field(...)` one by one."""
    return [part for item in metadata for part in getattr(item, "metadata", None) or [item]]


def _is_number(annotation: Any) -> bool:
    return annotation is int or (typing.get_args(annotation) or (None,))[0] is int
