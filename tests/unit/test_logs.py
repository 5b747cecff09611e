"""The log's two formats, its guard against floods, and Envoy's lines in it."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.logs import EnvoyLog, GuardedHandler, JsonFormatter, TextFormatter, configure, shorten


@pytest.fixture
def restored():
    """Logging as it was, whatever the test configures."""
    root, ours = logging.getLogger(), logging.getLogger("forno")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    logging.captureWarnings(capture=False)
    for handler in [each for each in root.handlers if each not in handlers]:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def record(msg: str = "Loaded %s", *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("forno").makeRecord("forno", level, "file.py", 1, msg, args, None, extra=extra)
    made.created = 1_766_000_000.1234
    return made


def test_text_is_one_aligned_line_with_its_extras():
    line = TextFormatter().format(record("Loaded %s", "digits", version="3", path="a b", took_ms=1.5))
    assert re.fullmatch(r'\d\d:\d\d:\d\d\.123 INFO     Loaded digits  version=3  path="a b"  took_ms=1.5', line)


def test_text_cannot_be_forged_by_what_a_caller_sent():
    line = TextFormatter().format(record("No model %s", "x\n12:00:00 ERROR \x1b[31mforged", request_id="a\nb c"))
    assert line.isprintable()
    assert '  request_id="a\\nb c"' in line


def test_text_names_the_logger_of_others():
    other = logging.makeLogRecord({"name": "forno.envoy", "msg": "up", "levelname": "INFO"})
    assert TextFormatter().format(other).endswith("INFO     envoy: up")


def test_json_has_its_fields_in_order():
    made = record("Refused", level=logging.WARNING, rows=3, request_id="r-1", level_of="x")
    assert list(json.loads(JsonFormatter().format(made)).items()) == [
        ("ts", "2025-12-17T19:33:20.123Z"),
        ("level", "warning"),
        ("logger", "forno"),
        ("msg", "Refused"),
        ("request_id", "r-1"),
        ("rows", 3),
        ("level_of", "x"),
    ]


def test_json_keeps_its_own_fields_from_being_overwritten():
    fields = json.loads(JsonFormatter().format(record("Read", ts="mine", level_="b")))
    assert fields["ts"].startswith("2025")
    assert fields["ts_"] == "mine"


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, b"raw", "\ud800", object()])
def test_json_takes_any_extra(value):
    line = JsonFormatter().format(record("Read", value=value))
    json.loads(line, parse_constant=pytest.fail)


@given(st.text())
def test_json_is_always_one_line(text):
    line = JsonFormatter().format(record("%s", text, note=text))
    assert "\n" not in line
    assert json.loads(line)["msg"] == text


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_traceback_is_kept(formatter):
    try:
        raise ValueError("broken")
    except ValueError:
        made = logging.getLogger("forno").makeRecord("forno", logging.ERROR, "file.py", 1, "Failed", (), sys.exc_info())
    assert "ValueError: broken" in formatter.format(made)


@pytest.mark.usefixtures("restored")
def test_auto_is_json_where_nobody_watches(capsys):
    configure("info", "auto")
    logging.getLogger("forno").info("Started")
    logging.getLogger("forno").debug("Unseen")
    logging.getLogger("library").info("Unseen")
    assert [json.loads(line)["msg"] for line in capsys.readouterr().err.splitlines()] == ["Started"]


@pytest.mark.usefixtures("restored")
def test_auto_is_text_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure("debug", "auto")
    logging.getLogger("forno.batcher").debug("Seen")
    assert capsys.readouterr().err.endswith("DEBUG    batcher: Seen\n")


@pytest.mark.usefixtures("restored")
def test_configured_twice_it_writes_once(capsys):
    configure("info", "json")
    configure("error", "json")
    logging.getLogger("forno").warning("Unseen")
    logging.getLogger("forno").error("Seen")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.usefixtures("restored")
def test_warnings_of_python_are_logged(capsys):
    configure("info", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)  # catch_warnings put its own in place
        logging.captureWarnings(capture=True)
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert "DeprecationWarning: old way" in json.loads(line)["msg"]


def guarded(stream: io.StringIO, now_s: list[float]) -> GuardedHandler:
    handler = GuardedHandler(limit_per_s=3, clock_s=lambda: now_s[0])
    handler.setStream(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


def test_a_flood_is_held_back_and_told_of():
    stream, now_s = io.StringIO(), [0.0]
    handler = guarded(stream, now_s)
    for index in range(100):
        handler.handle(record("Queue is full: %d rows", index, level=logging.WARNING))
    handler.handle(record("Other", level=logging.WARNING))
    now_s[0] = 1.0
    handler.handle(record("Recovered"))
    assert stream.getvalue().splitlines() == [
        "Queue is full: 0 rows",
        "Queue is full: 1 rows",
        "Queue is full: 2 rows",
        "Other",
        "Queue is full: 99 rows ... repeated 97 times",
        "Recovered",
    ]


def test_what_was_held_back_is_told_at_the_end():
    stream = io.StringIO()
    handler = guarded(stream, [0.0])
    for _ in range(5):
        handler.handle(record("Late", level=logging.ERROR))
    handler.close()
    assert stream.getvalue().splitlines() == ["Late"] * 3 + ["Late ... repeated 2 times"]


def test_a_flood_of_ever_different_messages_is_held_back_too():
    stream = io.StringIO()
    handler = guarded(stream, [0.0])
    for index in range(1000):
        handler.handle(record(f"Late {index}", level=logging.WARNING))
    assert len(stream.getvalue().splitlines()) < 300


def test_infos_are_not_held_back():
    stream = io.StringIO()
    handler = guarded(stream, [0.0])
    for _ in range(50):
        handler.handle(record("Loaded"))
    assert len(stream.getvalue().splitlines()) == 50


def test_lines_of_envoy_become_records(caplog):
    caplog.set_level(logging.DEBUG, logger="forno.envoy")
    envoy = EnvoyLog()
    for line in (
        "libpython was not found\n",
        "trace\thttp\tone\n",
        "info\tmain\tstarting main dispatch loop",
        "\n",
        "warning\tconfig\twith\ttabs and 100% of it",
        "  and more of it",
        "critical\tbacktrace\tCaught Aborted",
    ):
        envoy.line(line)
    assert [(r.levelname, r.getMessage(), getattr(r, "component", None)) for r in caplog.records] == [
        ("WARNING", "libpython was not found", None),
        ("DEBUG", "one", "http"),
        ("INFO", "starting main dispatch loop", "main"),
        ("WARNING", "with\ttabs and 100% of it", "config"),
        ("WARNING", "  and more of it", None),
        ("CRITICAL", "Caught Aborted", "backtrace"),
    ]


def test_of_a_printed_configuration_the_beginning_and_the_reason_are_kept(caplog):
    envoy = EnvoyLog()
    envoy.line("critical\tmain\terror initializing configuration '': goo.gle/debugproto  ")
    for index in range(500):
        envoy.line(f"  clusters {{ name: {index} }}")
    envoy.line(": Proto constraint validation failed (port must be less than or equal to 65535)")
    envoy.line("Fatal Python error: Aborted")
    assert [each.getMessage() for each in caplog.records] == [
        "error initializing configuration '': goo.gle/debugproto",
        "  clusters { name: 0 }",
        "  clusters { name: 1 }",
        "  clusters { name: 2 }",
        ": Proto constraint validation failed (port must be less than or equal to 65535)",
        "Fatal Python error: Aborted",
    ]


def test_a_configuration_in_a_message_is_cut():
    message = 'error initializing configuration: {"admin": ' + "x" * 50_000
    assert shorten(message) == "error initializing configuration ... (50012 more characters)"
    assert len(shorten("x" * 50_000)) < 2100
    assert shorten("short") == "short"


@given(st.text())
def test_no_line_of_envoy_breaks_it(line):
    EnvoyLog().line(line)
