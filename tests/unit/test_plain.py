"""Settings as they travel to the processes that serve."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import warnings
from pathlib import Path

import pytest

from forno.server.config import Config
from forno.server.errors import ConfigError
from forno.server.plain import begin_apart, plain
from forno.server.repository import ModelSpec

GIVEN = {
    "models": {"spam": {"path": "spam.onnx", "batching": {"max_rows": 8}, "padding": {"sizes": [8, 16]}}},
    "endpoints": {"spam/detect": {"model": "spam", "input": {"codec": "text"}}},
}


def assert_reads_alike(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_reads_alike(one[key], other[key])
    elif hasattr(type(one), "model_fields"):
        for name in type(one).model_fields:
            assert_reads_alike(getattr(one, name), getattr(other, name))
        assert one.model_fields_set == other.model_fields_set
    else:
        assert type(one) is type(other)
        assert one == other


def test_every_setting_reads_as_before_and_after_travelling():
    config = Config.model_validate(GIVEN)
    spec = ModelSpec("spam", "1", Path("spam.onnx"), config.models["spam"])
    travelled, [found] = pickle.loads(pickle.dumps(plain((config, [spec]))))
    assert_reads_alike(config, travelled)
    assert (found.name, found.version, found.path) == ("spam", "1", Path("spam.onnx"))
    assert_reads_alike(spec.settings, found.settings)


def test_what_travels_needs_no_pydantic():
    data = pickle.dumps(plain(Config.model_validate(GIVEN)))
    assert b"pydantic" not in data
    assert b"forno.server.config" not in data


def test_properties_travel_too():
    class Derived(Config):
        @property
        def model_count(self) -> int:
            return len(self.models)

    assert plain(Derived.model_validate(GIVEN)).model_count == 1


def test_a_copy_has_what_was_updated():
    batching = plain(Config.model_validate(GIVEN)).models["spam"].batching
    copy = batching.model_copy(update={"max_rows": 4})
    assert (copy.max_rows, copy.model_fields_set, batching.max_rows) == (4, {"max_rows"}, 8)


@pytest.fixture
def forking(monkeypatch):
    """The suite may have threads, which are no trouble for a process that only answers."""
    monkeypatch.setattr("forno.server.plain.threading.active_count", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.usefixtures("forking")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
class TestApart:
    def test_the_result_is_found_out_in_another_process(self):
        assert begin_apart(os.getpid)() != os.getpid()

    def test_an_interrupt_ends_it_without_a_word(self):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        there = begin_apart(lambda: (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())))()
        assert there == (signal.SIG_DFL, before)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before

    def test_nothing_it_imports_stays(self, tmp_path, monkeypatch):
        def look() -> bool:
            import heavy_for_once as found

            return bool(found)

        (tmp_path / "heavy_for_once.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        assert begin_apart(look)()
        assert "heavy_for_once" not in sys.modules

    def test_an_error_is_raised_here_as_if_nothing_had_been_tried(self):
        here = []

        def fail() -> None:
            here.append(os.getpid())
            raise ConfigError("server.adress is unknown")

        wait = begin_apart(fail)
        with pytest.raises(ConfigError, match=r"server\.adress is unknown"):
            wait()
        assert here == [os.getpid()]

    def test_a_large_result_arrives_whole(self):
        assert len(begin_apart(lambda: b"x" * 3_000_000)()) == 3_000_000


def test_where_threads_run_it_is_called_here(monkeypatch):
    monkeypatch.setattr("forno.server.plain.threading.active_count", lambda: 2)
    assert begin_apart(os.getpid)() == os.getpid()
