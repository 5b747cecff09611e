"""What a server serves: its models and the endpoints over them, as settings say, at the start and at each reload."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from forno.server import endpoints
from forno.server.cache import CachedModel
from forno.server.model import Model, ModelState
from forno.server.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forno.server.config import Config
    from forno.server.endpoints.endpoint import Endpoint
    from forno.server.metrics import Metrics
    from forno.server.repository import ModelSpec

_NOT_OF_A_RUN = ("labels", "versions", "path", "model_fields_set")
"""Settings that say which versions there are and what leads to them, and nothing of how one runs."""


class Change(NamedTuple):
    """What a reload has changed."""

    new: list[Model]  # that were loaded, some of them in the place of others
    gone: list[Model]  # that nobody can find any more; they still run what they hold


class Catalog:
    """The models and endpoints of a server. Owned by it; event loop only.

    Args:
        config: All settings.
        specs: The models.
        metrics: Where they are counted.

    Raises:
        ConfigError: An endpoint is wrong.
    """

    def __init__(self, config: Config, specs: Sequence[ModelSpec], metrics: Metrics) -> None:
        self._metrics = metrics
        self._specs = {(spec.name, spec.version): spec for spec in specs}
        self.registry = Registry()
        for spec in specs:
            self.registry.add(self._make(spec))
        _set_labels(self.registry, specs)
        self.endpoints: dict[str, Endpoint] = endpoints.build(config, self.registry)
        """By name; the same mapping for as long as the server lives."""

    async def load(self, on_loaded: Callable[[Model], None]) -> None:
        """Loads and warms up every model, one after another: each may use all cores.

        Raises:
            ConfigError: One cannot be served, or an endpoint does not fit its model.
            NotReady: One was stopped while it was loading, or before.
        """
        for model in self.registry.models():
            await model.load()
            on_loaded(model)
        for endpoint in self.endpoints.values():
            endpoint.check()

    async def change(self, config: Config, specs: Sequence[ModelSpec], on_made: Callable[[Model], None]) -> Change:
        """Serves what other settings say, all at once, when all that is new has been loaded.

        A model stays where neither its file nor a setting of its own has changed. Calls keep the model that they have
        found; the caller closes those that are gone when no such call can be left.

        Args:
            config: All settings.
            specs: The models.
            on_made: Told of each new model before it is loaded.

        Raises:
            ConfigError: Something cannot be served; nothing has changed.
        """
        there = {(model.name, model.version): model for model in self.registry.models()}
        ready = {key: model for key, model in there.items() if model.state is ModelState.READY}
        wanted, new = Registry(), []
        for spec in specs:
            key = spec.name, spec.version
            before = self._specs.get(key)
            model = ready.get(key) if before and _alike(before, spec) else None
            if model is None:
                model = self._make(spec)
                on_made(model)
                new.append(model)
            wanted.add(model)
        _set_labels(wanted, specs)
        try:
            for model in new:
                await model.load()
            endpoints.build(config, wanted)  # which checks them
        except BaseException:
            for model in new:
                await model.close(0.0)
            raise
        gone = self.registry.become(wanted)
        self._specs = {(spec.name, spec.version): spec for spec in specs}
        built = endpoints.build(config, self.registry)
        self.endpoints.clear()
        self.endpoints.update(built)
        return Change(new, gone)

    def _make(self, spec: ModelSpec) -> Model:
        kind = CachedModel if spec.settings.cache.max_bytes else Model
        return kind(spec.name, spec.version, spec.path, spec.settings, self._metrics.model(spec.name, spec.version))


def _set_labels(registry: Registry, specs: Sequence[ModelSpec]) -> None:
    for spec in specs:
        for label, version in spec.settings.labels.items():
            if version == spec.version:
                registry.set_label(spec.name, label, version)


def _alike(before: ModelSpec, after: ModelSpec) -> bool:
    """Whether a model of the one runs as one of the other would."""
    if (before.path, before.stamp) != (after.path, after.stamp):
        return False
    settings = [{k: v for k, v in vars(spec.settings).items() if k not in _NOT_OF_A_RUN} for spec in (before, after)]
    return settings[0] == settings[1]
