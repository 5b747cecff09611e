"""Says in one line each what is wrong with settings: where it stands, what was seen, what was expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forno.server.config import Config
from forno.server.errors import ConfigError
from forno.server.settings import shape
from forno.server.spelling import listed, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from forno.server.config import Settings

    Places = Mapping[tuple[str, ...], str]

_SHOWN_CHARACTERS = 60
_MOST_FAULTS = 20
"""A generated file with one mistake has it everywhere."""


def complaint(
    error: ValidationError, settings: type[Settings], values: Mapping[str, Any], places: Places, source: str
) -> ConfigError:
    """The first of the faults that validation found, and how many more there are, as one error.

    Args:
        error: What pydantic says.
        settings: What was to be made of the values.
        values: The values.
        places: Where each value stands.
        source: Where values without a place stand.
    """
    lines: dict[tuple[str, ...], str] = {}  # one for each setting, however many branches of a union it failed
    for details in error.errors(include_url=False, include_context=False):
        path, annotation, metadata = _reach(settings, details["loc"])
        text = _text(details, settings, path, _seen(values, path), shape.expected(annotation, metadata))
        lines.setdefault(path, f"{_place(places, path, source)}: {text}")
    told = [*lines.values()]
    if len(told) > _MOST_FAULTS:
        told[_MOST_FAULTS:] = [f"{source}: {len(told) - _MOST_FAULTS} more faults"]
    return ConfigError("\n".join(told))


def _reach(settings: type[Settings], loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], Any, list[Any]]:
    """The setting that a location of pydantic's is in, without the list index or union branch below it."""
    path: list[str] = []
    annotation: Any = settings
    metadata: list[Any] = []
    for key in loc:
        owner = shape.section(annotation)
        if owner is None and shape.entries(annotation) is None:
            break
        path.append(str(key))
        metadata = owner.model_fields[str(key)].metadata if owner and key in owner.model_fields else []
        annotation = shape.below(annotation, str(key))
    return tuple(path), annotation, metadata


def _text(details: ErrorDetails, settings: type[Settings], path: tuple[str, ...], seen: Any, expected: str) -> str:
    name = ".".join(path)
    match details["type"]:
        case "extra_forbidden":
            return unknown(settings, path)
        case "missing":
            return f"{name} is missing; expected {expected}"
        case "value_error":
            wanted = details["msg"].removeprefix("Value error, ")
            if isinstance(seen, dict):
                return f"{name or 'the file'} takes {wanted}"
            return f"{name} is {show(seen)}; expected {wanted}"
        case _:
            return f"{name} is {show(seen)}; expected {expected}"


def unknown(settings: type[Settings], path: tuple[str, ...]) -> str:
    """What to say of a key that is no setting: the nearest here, or one of that name elsewhere, or all."""
    owner: Any = settings
    for key in path[:-1]:
        owner = shape.below(owner, key)
    found = shape.section(owner) or settings
    text = f"{'.'.join(path)} is not a setting"
    here = [*found.model_fields]
    meant = nearest(path[-1], here) or _nested(found, path[-1]) or _elsewhere(path[-1])
    if meant is not None:
        return f"{text}; did you mean `{meant}`?"
    return f"{text}; {'.'.join(path[:-1]) or 'the top level'} has {listed(here)}"


def _nested(settings: type[Settings], word: str) -> str | None:
    """The setting of about that name in a section below, such as `batching.max_rows` for `max_rows`."""
    below = {path[-1]: ".".join(path) for path in shape.paths(settings) if len(path) > 1}
    found = nearest(word, below)
    return below[found] if found else None


def _elsewhere(word: str) -> str | None:
    """The setting of exactly that name in another section."""
    everywhere = {path[-1]: ".".join(path) for path in shape.paths(Config)}
    return everywhere.get(word)


def _seen(values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    seen: Any = values
    for key in path:
        seen = seen.get(key) if isinstance(seen, dict) else None
    return seen


def _place(places: Places, path: tuple[str, ...], source: str) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return source


def show(value: Any) -> str:
    """A value as a person would write it, cut where it is long."""
    match value:
        case None:
            return "empty"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case _:
            text = repr(value)
            return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
