"""The log: standard logging to stderr, text for a person or JSON lines for a machine, with Envoy's lines.

Loggers are `logging.getLogger("forno")` and its children. What belongs to a message goes beside it:
`log.warning("Cannot load %s", name, extra={"request_id": request_id, "version": version})`. Nothing is logged
for a request that goes well.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes that every record has; all others came as `extra`."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {9: "\t", 10: r"\n", 13: r"\r"}
"""A caller's text must not be able to forge lines, nor to speak to the terminal."""


def configure(
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["auto", "text", "json"] = "auto",  # noqa: A002 - as the setting is called
) -> None:
    """Send all logging of the process to stderr. Call once at start; a second call replaces the first.

    Args:
        level: The least that loggers of Forno show. Those of libraries show warnings and above.
        format: "auto" is text on a terminal and JSON lines otherwise.
    """
    text = sys.stderr.isatty() if format == "auto" else format == "text"
    handler = GuardedHandler()
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    root = logging.getLogger()
    for old in [each for each in root.handlers if isinstance(each, GuardedHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    logging.getLogger("forno").setLevel(level.upper())
    logging.captureWarnings(capture=True)


class TextFormatter(logging.Formatter):
    """`12:03:04.123 WARNING  Cannot load digits  version=3`: one line a record, tracebacks below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        when = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        origin = "" if record.name == "forno" else f"{record.name.removeprefix('forno.')}: "
        message = record.getMessage().rstrip().translate(_CONTROLS)
        extras = "".join(f"  {key}={_plain(value)}" for key, value in _extras(record).items())
        line = f"{when} {record.levelname:<8} {origin}{message}{extras}"
        trace = _trace(record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, msg, then request_id and other extras, then exc."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = {
            "ts": when.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        for key, value in _extras(record).items():
            name = f"{key}_" if key in {"ts", "level", "logger", "exc"} else key
            # JSON has no NaN; a reader of the log should not have to care.
            fields[name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
        trace = _trace(record)
        if trace:
            fields["exc"] = trace
        return json.dumps(fields, default=str, separators=(",", ":"))


class GuardedHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, warnings of one kind at most so many times a second. Any thread, under its lock.

    Warnings and errors are of one kind if their logger, level and message before formatting are the same.
    What is held back is told in one line, "... repeated K times", with the first record after that second.

    Args:
        limit_per_s: How many of one kind are written within a second.
        clock_s: Monotonic seconds.
    """

    _MAX_KINDS = 256

    def __init__(self, limit_per_s: int = 10, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._limit_per_s = limit_per_s
        self._clock_s = clock_s
        self._window_ends_s = float("-inf")
        self._seen: dict[tuple[str, int, str], int] = {}
        self._last: dict[tuple[str, int, str], logging.LogRecord] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or hold it back."""
        if self._clock_s() >= self._window_ends_s:
            self._tell()
            self._window_ends_s = self._clock_s() + 1
        if record.levelno >= logging.WARNING:
            kind = (record.name, record.levelno, str(record.msg))
            if kind not in self._seen and len(self._seen) >= self._MAX_KINDS:
                kind = (record.name, record.levelno, "")  # messages that differ each time are a flood, too
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] > self._limit_per_s:
                self._last[kind] = record
                return
        super().emit(record)

    def close(self) -> None:
        """Tell what is still held back, and end."""
        self.acquire()
        try:
            self._tell()
        finally:
            self.release()
        super().close()

    def _tell(self) -> None:
        for kind, last in self._last.items():
            count = self._seen[kind] - self._limit_per_s
            told = logging.makeLogRecord(vars(last))
            told.msg = f"{last.getMessage()} ... repeated {count} times"
            told.args = None
            told.exc_info = told.exc_text = None
            super().emit(told)
        self._seen.clear()
        self._last.clear()


ENVOY_FORMAT = "%l\t%n\t%v"
"""What `EnvoyLog` reads: Envoy's option --log-format."""

_ENVOY_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_ENVOY_LINE = re.compile(rf"({'|'.join(_ENVOY_LEVELS)})\t([^\t]*)\t(.*)", re.DOTALL)
_ENVOY_DUMP = "goo.gle/debug"  # protobuf writes it before a message in text form
_MAX_ENVOY_CHARS = 2000


class EnvoyLog:
    """Turns lines of Envoy's log (`ENVOY_FORMAT`) into records of "forno.envoy". One reader; one thread.

    A line without a level goes on with the message before it, and has its level. Where Envoy prints a whole
    configuration before it says what is wrong with it, only the beginning and the reason are kept.
    """

    _KEPT_DUMP_LINES = 3

    def __init__(self) -> None:
        self._log = logging.getLogger("forno.envoy")
        self._level = logging.WARNING  # what comes before the first line of its format is worth seeing
        self._dumped_lines: int | None = None  # of a configuration that is being printed

    def line(self, line: str) -> None:
        """Log one line, or leave it out."""
        text = line.rstrip()
        if not text:
            return
        match = _ENVOY_LINE.fullmatch(text)
        if match is not None:
            self._level = _ENVOY_LEVELS[match[1]]
            self._dumped_lines = 0 if _ENVOY_DUMP in text else None
            self._log.log(self._level, shorten(match[3]), extra={"component": match[2]})
            return
        if self._dumped_lines is not None:
            self._dumped_lines = None if text.startswith(": ") else self._dumped_lines + 1
            if self._dumped_lines is not None and self._dumped_lines > self._KEPT_DUMP_LINES:
                return
        self._log.log(self._level, shorten(text))


def shorten(message: str) -> str:
    """Cut the configuration that Envoy prints with some messages, and whatever else makes one enormous."""
    kept, cut, _ = message.partition(': {"')
    if not cut:
        kept = message[:_MAX_ENVOY_CHARS]
    kept = kept[:_MAX_ENVOY_CHARS]
    left_chars = len(message) - len(kept)
    return f"{kept} ... ({left_chars} more characters)" if left_chars else kept


def _extras(record: logging.LogRecord) -> dict[str, object]:
    extras = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    if "request_id" in extras:
        return {"request_id": extras.pop("request_id"), **extras}
    return extras


def _plain(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[^\s\"=\x00-\x1f\x7f]+", text) else json.dumps(text, ensure_ascii=False)


def _trace(record: logging.LogRecord) -> str:
    if record.exc_info and not record.exc_text:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    stack = logging.Formatter().formatStack(record.stack_info) if record.stack_info else ""
    return "\n".join(part for part in (record.exc_text, stack) if part)
