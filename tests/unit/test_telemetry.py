"""Which calls are traced, and how complaints about the collector are held back."""

from __future__ import annotations

import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.config import TelemetrySettings
from forno.server.errors import ConfigError
from forno.server.metrics import Metrics
from forno.server.otlp import Quiet
from forno.server.telemetry import Parent, Telemetry

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


class Nowhere:
    """Stands where the sender stands; sampling never reaches it."""


def telemetry(**settings: object) -> Telemetry:
    return Telemetry(TelemetrySettings.model_validate(settings), Metrics(), Nowhere())


@pytest.mark.parametrize("flags", ["01", "03", "ff", "0f"])
def test_the_caller_decides_that_it_is_traced(flags):
    assert telemetry().sampled(f"00-{TRACE}-{SPAN}-{flags}") == Parent(int(TRACE, 16), int(SPAN, 16))


@pytest.mark.parametrize("flags", ["00", "02", "f0", "fe"])
def test_the_caller_decides_that_it_is_not_traced(flags):
    assert telemetry(sample_ratio=1).sampled(f"00-{TRACE}-{SPAN}-{flags}") is None


def test_a_later_version_of_the_header_is_read_as_far_as_it_is_known():
    assert telemetry().sampled(f"cc-{TRACE}-{SPAN}-01-what-comes") == Parent(int(TRACE, 16), int(SPAN, 16))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}_-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}-{SPAN}-0x",
    ],
)
def test_an_unreadable_header_is_none(header):
    assert telemetry().sampled(header) is None
    root = telemetry(sample_ratio=1).sampled(header)
    assert root is not None
    assert root.span_id == 0
    assert 0 < root.trace_id < 1 << 128


@given(st.text(max_size=80))
def test_no_header_breaks_it(header):
    telemetry(sample_ratio=0.5).sampled(header)


def test_the_ratio_is_kept():
    sampler = telemetry(sample_ratio=0.25)
    assert 2000 < sum(sampler.sampled(None) is not None for _ in range(10_000)) < 3000


def test_traces_can_be_off_alone():
    assert telemetry(traces=False, sample_ratio=1).sampled(f"00-{TRACE}-{SPAN}-01") is None


@pytest.mark.parametrize("settings", [{}, {"otlp_endpoint": "http://127.0.0.1:1", "traces": False}])
def test_nothing_starts_where_nothing_is_to_be_sent(settings):
    assert Telemetry.start(TelemetrySettings.model_validate(settings), Metrics()) is None


def test_an_endpoint_without_a_scheme_is_refused():
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1:4317'; expected a URL such as http://"):
        Telemetry.start(TelemetrySettings(otlp_endpoint="127.0.0.1:4317"), Metrics())


def test_a_missing_opentelemetry_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "forno.server.otlp")
    with pytest.raises(ConfigError, match=r"pip install 'forno\[server,telemetry\]'"):
        Telemetry.start(TelemetrySettings(otlp_endpoint="http://127.0.0.1:1"), Metrics())


def test_one_complaint_a_minute_passes_and_tells_of_the_others():
    now_s = [0.0]
    quiet = Quiet(lambda: now_s[0])

    def complain() -> tuple[bool, logging.LogRecord]:
        record = logging.makeLogRecord({"msg": "no %s", "args": ("route",), "levelno": logging.ERROR})
        return quiet.filter(record), record

    assert complain()[0]
    assert not any(complain()[0] for _ in range(99))
    now_s[0] = 60.0
    passed, record = complain()
    assert passed
    assert record.getMessage() == "Telemetry does not reach its collector: no route (99 more held back)"
    assert record.levelname == "WARNING"
    quiet.hold_all()
    assert not complain()[0]
    assert quiet.filter(logging.makeLogRecord({"levelno": logging.DEBUG}))
