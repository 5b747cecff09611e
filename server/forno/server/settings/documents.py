"""Reads a YAML file into plain values, strictly, and remembers on which line each stands.

The values are those of YAML 1.2: `no` is a word and not false, 010 is ten, 12:30 is a text. Keys are always
text, so that a model may be called 1. A key given twice is refused, as are tags and a value that contains
itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MOST_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"
_BASE: type[Any] = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_PLAIN_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)


class _Loader(_BASE):  # type: ignore[misc]  # one of two classes of PyYAML
    """PyYAML's parser with the plain scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name; not those of YAML 1.1)


for _name, _pattern, _first in _PLAIN_SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), [*_first])
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"\Z"), [""])


@dataclass(frozen=True)
class Document:
    """What a file says."""

    values: dict[str, Any]
    places: dict[tuple[str, ...], str]  # path of keys -> "forno.yaml:7"


def read(file: Path) -> Document:
    """Reads a file whose top level is a mapping, or which is empty.

    Raises:
        ConfigError: It cannot be read, is not YAML, or says something twice; the text names the line.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start}); expected a YAML file") from error
    reader = _Reader(str(file))
    node = reader.compose(text)
    if node is None or node.tag == _TAG + "null":
        return Document({}, {})
    if not isinstance(node, yaml.MappingNode):
        raise reader.fault(node, "expected settings as `name: value` lines")
    return Document(reader.mapping(node, ()), reader.places)


def parse(text: str, place: str) -> Any:
    """The value that a text such as `5`, `true` or `[a, b]` means; an empty text is the empty text.

    Raises:
        ConfigError: It is not YAML; the text begins with `place`.
    """
    if not text:
        return ""
    reader = _Reader(place, is_one_value=True)
    node = reader.compose(text)
    return "" if node is None else reader.value(node, ())


class _Reader:
    """Makes values of the nodes of one document. Used once.

    Args:
        source: What messages call it.
        is_one_value: Whether lines in it mean nothing to a reader.
    """

    def __init__(self, source: str, *, is_one_value: bool = False) -> None:
        self.source = source
        self._is_one_value = is_one_value
        self.places: dict[tuple[str, ...], str] = {}
        self._open: list[Any] = []  # nodes being read, to notice one inside itself
        self._count = 0

    def compose(self, text: str) -> Any:
        """The root node of the text, None where there is none."""
        try:
            return yaml.compose(text, _Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place, tab = self.source, False
            if mark is not None and not self._is_one_value:
                place = f"{place}:{mark.line + 1}:{mark.column + 1}"
                tab = "\t" in "".join(text.split("\n")[mark.line : mark.line + 1])[: mark.column + 1]
            hint = " (YAML indents with spaces, here is a tab)" if tab else ""
            raise ConfigError(f"{place}: not YAML: {error.problem or error.context}{hint}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.source}: not YAML: {' '.join(str(error).split())}") from error
        except RecursionError as error:
            raise ConfigError(f"{self.source}: nested too deeply") from error

    def fault(self, node: Any, text: str) -> ConfigError:
        """An error that points at a node."""
        line = "" if self._is_one_value else f":{node.start_mark.line + 1}"
        return ConfigError(f"{self.source}{line}: {text}")

    def value(self, node: Any, path: tuple[str, ...]) -> Any:
        """The plain value of a node."""
        self._count += 1
        if self._count > _MOST_VALUES:  # a few anchors that name each other make billions
            raise self.fault(node, f"more than {_MOST_VALUES} values in one file")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is outer for outer in self._open):
            raise self.fault(node, "this value contains itself")
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            self._check_tag(node, "seq")
            return [self.value(item, (*path, str(index))) for index, item in enumerate(node.value)]
        except RecursionError as error:
            raise ConfigError(f"{self.source}: nested too deeply") from error
        finally:
            self._open.pop()

    def mapping(self, node: Any, path: tuple[str, ...]) -> dict[str, Any]:
        """The values of a mapping by key; what it says itself wins over what it merges with `<<`."""
        self._check_tag(node, "map")
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.fault(key_node, "a key is a list or a mapping; expected a name")
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                raise self.fault(key_node, f"`{key}` is given twice, first on line {lines[key]}")
            lines[key] = line
            if key_node.tag == _TAG + "merge":
                for part in self._merged(value_node):
                    merged = {**self.value(part, path), **merged}
                continue
            self.places[*path, key] = f"{self.source}:{line}"
            own[key] = self.value(value_node, (*path, key))
        return {**merged, **own}

    def _merged(self, node: Any) -> Iterator[Any]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise self.fault(part, "`<<` merges a mapping, such as `<<: *name`")
            yield part

    def _scalar(self, node: Any) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        try:
            match kind:
                case "str" | "merge":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError) as error:
            raise self.fault(node, f"{text!r} is no {kind}") from error
        raise self._tagged(node)

    def _check_tag(self, node: Any, kind: str) -> None:
        if node.tag != _TAG + kind:
            raise self._tagged(node)

    def _tagged(self, node: Any) -> ConfigError:
        tag = node.tag.replace(_TAG, "!!")
        return self.fault(node, f"the tag {tag} means nothing here; write the plain value")
