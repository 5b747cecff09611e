"""The settings as a reference for people: each with what it takes, its default and its documentation."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forno.server import config
from forno.server.settings import shape

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Entry:
    """One setting."""

    path: str  # "models.NAME.batching.max_rows"
    expected: str
    default: str
    text: str


def entries() -> list[Entry]:
    """Every setting, section by section; NAME stands for a name of the user's."""
    return [*_section(config.Config, "")]


def _section(settings: type[config.Settings], prefix: str) -> Iterator[Entry]:
    texts = _documentation(settings.__module__)[settings.__name__]
    for key, field in settings.model_fields.items():
        held = shape.entries(field.annotation)
        inner = shape.section(field.annotation) or shape.section(held)
        path = f"{prefix}{key}"
        if inner is not None:
            yield from _section(inner, f"{path}." if held is None else f"{path}.NAME.")
            continue
        default = "required" if field.is_required() else _yaml(field.default)
        yield Entry(path, shape.expected(field.annotation, field.metadata), default, texts[key])


def _yaml(value: Any) -> str:
    match value:
        case None:
            return "unset"
        case bool():
            return str(value).lower()
        case "":
            return "empty"
        case tuple():
            return str([*value])
        case _:
            return str(value)


@functools.cache
def _documentation(module: str) -> dict[str, dict[str, str]]:
    """Class of the module -> field -> the text below it in the source."""
    texts: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            fields = texts.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(words))):
                        fields[key] = " ".join(words.split())
    return texts
