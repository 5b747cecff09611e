"""(name, version or label) -> Model: the only mutable map of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forno.server.errors import NotFound
from forno.server.model import ModelState
from forno.server.security import access
from forno.server.spelling import nearest
from forno.server.versions import natural

if TYPE_CHECKING:
    from forno.server.model import Model

_SERVED = (ModelState.LOADING, ModelState.READY, ModelState.FAILED)


class Registry:
    """The models of a server. Owned by the server; event loop only.

    Each change swaps in new content at once: a `get` sees all of it or nothing. A request keeps the model that it got.
    """

    def __init__(self) -> None:
        self._versions: dict[str, tuple[Model, ...]] = {}  # newest first; no tuple is empty
        self._labels: dict[tuple[str, str], str] = {}  # (name, label) -> version

    def get(self, name: str, version: str = "", label: str = "") -> Model:
        """The model that should answer the call that runs: that version, that label's, or the newest that is ready.

        Raises:
            PermissionDenied: It is not for this caller, whether or not there is one.
            NotFound: There is none of that name, version or label.
            NotReady: There is one, but it cannot serve now.
        """
        access.check("model", name)
        if not (version or label):  # a glance at what is nearly always meant
            versions = self._versions.get(name)
            if versions is not None and versions[0].state is ModelState.READY:
                return versions[0]
        return self.resolve(name, version, label)

    def find(self, name: str, version: str = "", label: str = "") -> Model:
        """As `get`, but also a model that is not ready.

        Raises:
            PermissionDenied: It is not for this caller, whether or not there is one.
            NotFound: There is none of that name, version or label.
        """
        access.check("model", name)
        return self._find(name, version, label)

    def resolve(self, name: str, version: str = "", label: str = "") -> Model:
        """As `get`, without a look at who calls: for what the server itself names, such as an endpoint's model.

        Raises:
            NotFound: There is none of that name, version or label.
            NotReady: There is one, but it cannot serve now.
        """
        model = self._find(name, version, label)
        if model.state is ModelState.READY:
            return model
        raise model.not_ready()

    def seen(self) -> list[Model]:
        """The models that the caller of the call that runs may know of, in the order of `models`."""
        return [model for model in self.models() if access.sees("model", model.name)]

    def _find(self, name: str, version: str, label: str) -> Model:
        versions = self._versions.get(name)
        if versions is None:
            raise self._unknown(name)
        if version or label:
            return self._exactly(name, versions, version, label)
        return next((model for model in versions if model.state is ModelState.READY), versions[0])

    def models(self) -> list[Model]:
        """All models by name, the newest version first."""
        return [model for name in sorted(self._versions) for model in self._versions[name]]

    def labels_of(self, model: Model) -> list[str]:
        """Labels that lead to this version."""
        return sorted(
            label for (name, label), version in self._labels.items() if name == model.name and version == model.version
        )

    def add(self, model: Model) -> Model | None:
        """Adds a model, in the place of one of the same name and version.

        Returns:
            The model that was there, which the caller closes.
        """
        others = self._versions.get(model.name, ())
        replaced = next((other for other in others if other.version == model.version), None)
        kept = [other for other in others if other is not replaced]
        kept.append(model)
        self._versions[model.name] = tuple(sorted(kept, key=lambda each: natural(each.version), reverse=True))
        return replaced

    def remove(self, name: str, version: str) -> Model:
        """Takes a version out, and the labels that lead to it.

        Returns:
            The model, which the caller closes.

        Raises:
            NotFound: There is none of that name and version.
        """
        versions = self._versions.get(name)
        if versions is None:
            raise self._unknown(name)
        model = self._exactly(name, versions, version, "")
        kept = tuple([other for other in versions if other is not model])
        if kept:
            self._versions[name] = kept
        else:
            del self._versions[name]
        self._labels = {key: to for key, to in self._labels.items() if not (key[0] == name and to == version)}
        return model

    def set_label(self, name: str, label: str, version: str) -> None:
        """Lets a label lead to a version, whether or not it did to another.

        Raises:
            NotFound: There is none of that name and version.
        """
        versions = self._versions.get(name)
        if versions is None:
            raise self._unknown(name)
        self._labels[name, label] = self._exactly(name, versions, version, "").version

    def become(self, other: Registry) -> list[Model]:
        """Takes over all that another one knows, at once.

        Returns:
            The models that it no longer knows, which the caller closes.
        """
        before = self.models()
        self._versions, self._labels = other._versions, other._labels
        kept = {id(model) for model in self.models()}
        return [model for model in before if id(model) not in kept]

    def ready(self) -> bool:
        """Whether every model that should serve is ready."""
        return all(model.state is ModelState.READY for model in self.models() if model.state in _SERVED)

    def _exactly(self, name: str, versions: tuple[Model, ...], version: str, label: str) -> Model:
        if version and label:
            raise NotFound(f"model '{name}': version '{version}' and label '{label}' given, expected one of them")
        if label:
            version = self._labels.get((name, label), "")
            if not version:
                known = sorted(known for owner, known in self._labels if owner == name)
                raise NotFound(f"model '{name}' has no label '{label}'; it has {_listed(known)}")
        for model in versions:
            if model.version == version:
                return model
        raise NotFound(
            f"model '{name}' has no version '{version}'; it has {_listed([model.version for model in versions])}"
        )

    def _unknown(self, name: str) -> NotFound:
        known = access.visible("model", sorted(self._versions))
        near = nearest(name, known)
        hint = f"did you mean '{near}'?" if near else f"known are {_listed(known[:10])}"
        return NotFound(f"model '{name}' is unknown; {hint}")


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
