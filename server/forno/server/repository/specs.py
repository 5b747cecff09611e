"""Joins what lies on disk with what the settings say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forno.server.config import ModelSettings
from forno.server.errors import ConfigError
from forno.server.repository.folders import LAYOUT, ONLY_VERSION, Found, check_name, look, stamp_of
from forno.server.settings import load_model
from forno.server.spelling import listed, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from forno.server.config import Config


@dataclass(frozen=True)
class ModelSpec:
    """One version of a model that is to be served."""

    name: str
    version: str
    path: Path | None  # the model file; None for an engine that needs none
    settings: ModelSettings
    stamp: tuple[tuple[str, int, int, int], ...] = ()  # of the file and those beside it: other where they have changed


def find(paths: Sequence[Path], config: Config) -> list[ModelSpec]:
    """Every version of every model to serve: those at the paths, in their order, then those of the settings.

    The newest version of a model comes first. Where a model has a `model.yaml`, the settings win over it.

    Raises:
        ConfigError: A path holds no model, two models have one name, settings or an endpoint name a model,
            version or label that is not there, or there is nothing to serve.
    """
    found: dict[str, Found] = {}
    specs: list[ModelSpec] = []
    for path in paths:
        for model in look(path):
            _add(found, model)
            specs += _versions(model, _settings(model, config.models.get(model.name)))
    for name, settings in config.models.items():
        if settings.path is None and name in found:
            continue  # they were settings for a model at one of the paths
        model = _configured(name, settings, [*found])
        _add(found, model)
        specs += _versions(model, _settings(model, settings))
    if not specs:
        raise ConfigError(f"nothing to serve; expected a PATH to {LAYOUT}, to a folder of such, or to a forno.yaml")
    _check_endpoints(config, specs)
    return specs


def _add(found: dict[str, Found], model: Found) -> None:
    if model.name in found:
        raise ConfigError(
            f"two models are called {model.name!r}: {found[model.name].place} and {model.place}; "
            "rename one, or list both with names of your own in a forno.yaml"
        )
    found[model.name] = model


def _configured(name: str, settings: ModelSettings, found: Sequence[str]) -> Found:
    """The model that an entry of `models` brings with it."""
    place = f"models.{name}"
    check_name(name, place)
    if settings.path is None:
        if settings.engine == "null":
            return Found(name, place)
        meant = nearest(name, found)
        hint = f"did you mean `{meant}`?" if meant else "give it a `path`, or its folder on the command line"
        raise ConfigError(f"{place}: there is no model of this name; {hint}")
    models = look(settings.path)
    if len(models) > 1:
        names = listed([model.name for model in models])
        raise ConfigError(f"{place}.path: {settings.path} holds several models ({names}); expected one")
    return Found(name, str(settings.path), models[0].files, models[0].settings_file)


def _settings(model: Found, override: ModelSettings | None) -> ModelSettings:
    if model.settings_file is None:
        return override or ModelSettings()
    return load_model(model.settings_file, override)


def _versions(model: Found, settings: ModelSettings) -> Iterator[ModelSpec]:
    """The versions of a model that its settings ask for."""
    if settings.engine == "null":
        versions = [ONLY_VERSION]
    elif not model.files:
        raise ConfigError(f"{model.place}: no model file in this folder; looked for {LAYOUT}")
    else:
        versions = _wanted(model, settings.versions)
    for label, version in settings.labels.items():
        if version not in versions:
            raise ConfigError(
                f"{model.place}: label {label!r} is for version {version!r}, which is not served; "
                f"served are {listed(versions)} (`versions` says which)"
            )
    for version in versions:
        path = None if settings.engine == "null" else model.files[version]
        yield ModelSpec(model.name, version, path, settings, stamp_of(path) if path else ())


def _wanted(model: Found, wanted: int | tuple[str, ...]) -> list[str]:
    there = [*model.files]
    if isinstance(wanted, int):
        return there[:wanted]
    for version in wanted:
        if version not in there:
            raise ConfigError(f"{model.place}: version {version!r} is not there; there are {listed(there)}")
    return [version for version in there if version in wanted]


def _check_endpoints(config: Config, specs: Sequence[ModelSpec]) -> None:
    for name, endpoint in config.endpoints.items():
        place = f"endpoints.{name}"
        served = [spec for spec in specs if spec.name == endpoint.model]
        if not served:
            names = sorted({spec.name for spec in specs})
            meant = nearest(endpoint.model, names)
            hint = f"did you mean `{meant}`?" if meant else f"served are {listed(names)}"
            raise ConfigError(f"{place}.model: there is no model {endpoint.model!r}; {hint}")
        versions = [spec.version for spec in served]
        if endpoint.version and endpoint.version not in versions:
            raise ConfigError(
                f"{place}.version: model {endpoint.model!r} has no version {endpoint.version!r}; "
                f"served are {listed(versions)}"
            )
        labels = [*served[0].settings.labels]
        if endpoint.label and endpoint.label not in labels:
            raise ConfigError(
                f"{place}.label: model {endpoint.model!r} has no label {endpoint.label!r}; there are {listed(labels)}"
            )
