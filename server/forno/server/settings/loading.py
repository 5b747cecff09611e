"""Puts the layers together and makes the typed tree of them."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from forno.server.config import Config, ModelSettings, Settings
from forno.server.errors import ConfigError
from forno.server.settings import shape
from forno.server.settings.complaints import complaint
from forno.server.settings.overrides import from_environment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from forno.server.settings.overrides import Override

Tree = TypeVar("Tree", bound=Settings)


def load(
    file: Path | None = None, environment: Mapping[str, str] | None = None, flags: Iterable[Override] = ()
) -> Config:
    """All settings. Paths of models and of keys in the file are relative to the file, others to the working directory.

    Args:
        file: The settings file, if any.
        environment: The process's environment.
        flags: The command line's settings, which win over the environment's.

    Raises:
        ConfigError: The file cannot be read, or a setting is unknown or wrong; one line for each fault.
    """
    values: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    if file is not None:
        values, places = _read(file)
        _root_model_paths(values, file.parent)
        _root_security_paths(values.get("security"), file.parent)
    for override in (*from_environment(environment or {}), *flags):
        _put(values, override.path, override.value)
        places[override.path] = override.place
    return _make(Config, values, places, str(file or "settings"))


def load_model(file: Path, override: ModelSettings | None = None) -> ModelSettings:
    """The settings in a `model.yaml`; what `override` sets wins.

    Raises:
        ConfigError: The file cannot be read, or a setting is unknown or wrong; one line for each fault.
    """
    values, places = _read(file)
    if values.get("path") is not None:
        raise ConfigError(f"{places.get(('path',), file)}: path is not for a {file.name}: the model lies beside it")
    settings = _make(ModelSettings, values, places, str(file))
    if override is None:
        return settings
    return ModelSettings.model_validate(
        _overlay(settings.model_dump(exclude_unset=True), override.model_dump(exclude_unset=True))
    )


def load_document(file: Path, settings: type[Tree]) -> Tree:
    """What a file of its own says, such as the keys file.

    Raises:
        ConfigError: The file cannot be read, or something in it is unknown or wrong; one line for each fault.
    """
    values, places = _read(file)
    return _make(settings, values, places, str(file))


def _read(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    from forno.server.settings import documents  # noqa: PLC0415  (YAML costs 15 ms of a start without any)

    document = documents.read(file)
    return document.values, document.places


def _make(settings: type[Tree], values: dict[str, Any], places: Mapping[tuple[str, ...], str], source: str) -> Tree:
    cleaned = _cleaned(values, settings)
    try:
        return settings.model_validate(cleaned)
    except ValidationError as error:
        raise complaint(error, settings, cleaned, places, source) from None


def _cleaned(value: Any, annotation: Any) -> Any:
    """The value with what YAML's null stands for.

    A section with nothing in it is an empty section, and `engine: null` means the engine of that name.
    """
    if value is None:
        if shape.section(annotation) is not None or shape.entries(annotation) is not None:
            return {}
        literals = [part for part in typing.get_args(annotation) if typing.get_origin(part) is typing.Literal]
        return "null" if any("null" in typing.get_args(part) for part in literals) else None
    if isinstance(value, dict):
        return {key: _cleaned(item, shape.below(annotation, key)) for key, item in value.items()}
    return value


def _root_model_paths(values: dict[str, Any], folder: Path) -> None:
    models = values.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        if isinstance(model, dict) and isinstance(model.get("path"), str):
            model["path"] = str(folder / model["path"])


def _root_security_paths(values: Any, folder: Path) -> None:
    """Every `..._file` below `security`."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            _root_security_paths(value, folder)
        elif isinstance(key, str) and key.endswith("_file") and isinstance(value, str):
            values[key] = str(folder / value)


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    below = values.get(path[-1])
    values[path[-1]] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value


def _overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both, key by key; `over` wins."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
