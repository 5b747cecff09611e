"""Which model answers to a name."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.puppets import RecordingMetrics

from forno.server.config import ModelSettings
from forno.server.errors import NotFound, NotReady
from forno.server.model import Model, ModelState
from forno.server.registry import Registry


def made(name: str, version: str, state: ModelState = ModelState.READY, error: str = "") -> Model:
    metrics: Any = RecordingMetrics()
    model = Model(name, version, None, ModelSettings(engine="null"), metrics)
    model.state, model.error = state, error
    return model


def filled(*models: Model) -> Registry:
    registry = Registry()
    for model in models:
        assert registry.add(model) is None
    return registry


def test_the_newest_ready_version_is_the_default():
    registry = filled(*[made("m", version) for version in ("2", "10", "9")], made("other", "1"))
    assert registry.get("m").version == "10"
    assert [str(model) for model in registry.models()] == ["m/10", "m/9", "m/2", "other/1"]
    registry.get("m").state = ModelState.FAILED
    assert registry.get("m").version == "9"


@pytest.mark.parametrize(
    ("versions", "newest_first"),
    [
        (["1", "02", "3"], ["3", "02", "1"]),
        (["v2", "v10", "v9"], ["v10", "v9", "v2"]),
        (["1.9", "1.10", "1"], ["1.10", "1.9", "1"]),
        (["2024-01-31", "2024-02-01"], ["2024-02-01", "2024-01-31"]),
        (["draft", "1"], ["1", "draft"]),
        (["", "a"], ["a", ""]),
    ],
)
def test_versions_sort_as_people_read_them(versions, newest_first):
    assert [model.version for model in filled(*[made("m", each) for each in versions]).models()] == newest_first


def test_exact_versions_and_labels():
    registry = filled(made("m", "1"), made("m", "2"))
    registry.set_label("m", "stable", "1")
    assert registry.get("m", version="1").version == "1"
    assert registry.get("m", label="stable").version == "1"
    registry.set_label("m", "stable", "2")
    registry.set_label("m", "canary", "2")
    assert registry.get("m", label="stable").version == "2"
    assert registry.labels_of(registry.get("m")) == ["canary", "stable"]
    assert registry.labels_of(registry.get("m", "1")) == []


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"name": "digit"}, "model 'digit' is unknown; did you mean 'digits'?"),
        ({"name": "zzz"}, "model 'zzz' is unknown; known are 'digits', 'spam'"),
        ({"name": "spam", "version": "3"}, "model 'spam' has no version '3'; it has '2', '1'"),
        ({"name": "spam", "label": "stable"}, "model 'spam' has no label 'stable'; it has 'beta'"),
        ({"name": "digits", "label": "stable"}, "model 'digits' has no label 'stable'; it has none"),
    ],
)
def test_what_is_not_there_names_what_is(asked, text):
    registry = filled(made("spam", "1"), made("spam", "2"), made("digits", "1"))
    registry.set_label("spam", "beta", "1")
    with pytest.raises(NotFound) as caught:
        registry.get(**asked)
    assert str(caught.value) == text


def test_an_empty_registry_is_ready_and_knows_nothing():
    assert Registry().ready()
    with pytest.raises(NotFound, match="known are none"):
        Registry().get("m")


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.FAILED, ModelState.DRAINING, ModelState.UNLOADED])
@pytest.mark.parametrize("version", ["", "1"])
def test_a_model_that_does_not_serve_says_why(state, version):
    registry = filled(made("m", "1", state, error="it broke"))
    with pytest.raises(NotReady, match=rf"'m' version '1' is {state.value}.*it broke"):
        registry.get("m", version)


def test_readiness_waits_for_every_model_that_should_serve():
    loading, ready, draining = (
        made("m", str(number), state)
        for number, state in enumerate((ModelState.LOADING, ModelState.READY, ModelState.DRAINING))
    )
    registry = filled(loading, ready, draining)
    assert not registry.ready()
    loading.state = ModelState.READY
    assert registry.ready()
    loading.state = ModelState.FAILED
    assert not registry.ready()


def test_adding_the_same_version_swaps_it():
    old, new = made("m", "1"), made("m", "1")
    registry = filled(old)
    assert registry.add(new) is old
    assert registry.get("m") is new
    assert registry.models() == [new]


def test_removing_takes_labels_along():
    registry = filled(made("m", "1"), made("m", "2"))
    registry.set_label("m", "old", "1")
    registry.set_label("m", "new", "2")
    assert registry.remove("m", "1").version == "1"
    with pytest.raises(NotFound, match="no label 'old'; it has 'new'"):
        registry.get("m", label="old")
    registry.remove("m", "2")
    for act in (
        lambda: registry.get("m"),
        lambda: registry.remove("m", "2"),
        lambda: registry.set_label("m", "a", "2"),
    ):
        with pytest.raises(NotFound, match="model 'm' is unknown"):
            act()
