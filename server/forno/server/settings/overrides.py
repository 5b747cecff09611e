"""Settings from the environment and the command line: which setting a name means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forno.server.config import Config, ServerSettings
from forno.server.errors import ConfigError
from forno.server.settings import shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PREFIX = "FORNO_"
NESTED = "__"


@dataclass(frozen=True)
class Override:
    """One value that wins over the file's."""

    path: tuple[str, ...]
    value: Any
    place: str  # what a message calls it: the variable's name or the flag

    @classmethod
    def flag(cls, key: str, value: str, flag: str) -> Override:
        """A command-line flag of its own, such as `--address`, whose value is taken as the text it is."""
        return cls(tuple(key.split(".")), value, flag)


def parse_set(argument: str) -> Override:
    """What `--set key=value` means; names of models and endpoints may have dots.

    Raises:
        ConfigError: It is not of that form, or the value is not YAML.
    """
    key, equals, text = argument.partition("=")
    path = _route(key.strip().split("."), ".")
    if not equals or not all(path):
        raise ConfigError(f"--set {argument}: expected KEY=VALUE, such as --set server.drain_s=5")
    place = f"--set {key.strip()}"
    return Override(path, _parse(text, place), place)


def from_environment(environment: Mapping[str, str]) -> Iterator[Override]:
    """What the variables `FORNO_SECTION__SETTING` say, in order of their names.

    Others that begin with FORNO_ are left alone (Kubernetes sets such for a service called "forno"), except
    where a missing underscore is the likely reason.

    Raises:
        ConfigError: A value is not YAML, or a name lacks an underscore.
    """
    for name in sorted(environment):
        rest = name.removeprefix(PREFIX)
        if rest == name:
            continue
        if NESTED in rest:
            path = _route(rest.split(NESTED), NESTED, fold=True)
            yield Override(path, _parse(environment[name], name), name)
        elif rest in _MISTAKEN:
            raise ConfigError(f"{name} is not read; did you mean {_MISTAKEN[rest]} (two underscores)?")


def _parse(text: str, place: str) -> Any:
    from forno.server.settings import documents  # noqa: PLC0415  (YAML costs 15 ms of a start without any)

    return documents.parse(text.strip(), place)


def _route(segments: list[str], joiner: str, *, fold: bool = False) -> tuple[str, ...]:
    """The keys that segments mean. One of the user's may hold the joiner: it ends where a setting follows."""

    def folded(key: str) -> str:
        return key.lower() if fold else key

    path: list[str] = []
    annotation: Any = Config
    rest = segments
    while rest:
        held = shape.section(shape.entries(annotation))
        take = 1
        if held is not None:
            take = next((n for n in range(1, len(rest)) if folded(rest[n]) in held.model_fields), 1)
        elif shape.entries(annotation) is str:
            take = len(rest)
        key = joiner.join(rest[:take])
        path.append(folded(key) if shape.section(annotation) else key)
        annotation, rest = shape.below(annotation, path[-1]), rest[take:]
    return tuple(path)


def _mistaken() -> dict[str, str]:
    """Names with one underscore, or without the section, to those that are meant."""
    names = {}
    for path in shape.paths(Config):
        if len(path) > 1:
            names["_".join(path).upper()] = PREFIX + NESTED.join(path).upper()
    for key in ServerSettings.model_fields:
        names[key.upper()] = f"{PREFIX}SERVER{NESTED}{key.upper()}"
    return names


_MISTAKEN = _mistaken()
