"""The native splitter of JSON bodies, compiled by itself for tests."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from tests.compiling import NATIVE, shared_library
from tests.e2e.forno_server import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Split = tuple[bytes, list[int], bytes] | None

SOURCES = ROOT / "server/forno/server/transport/envoy/native"
HEAD = b"head\n"


def compiled(folder: Path) -> Callable[[bytes, Sequence[int]], Split]:
    """A function of a body and the places where its pieces end: key, counts, and numbers as the bytes of doubles."""
    library = folder / "json_split.so"
    sources = (NATIVE / "json_split_c.cc", SOURCES / "json_split.cc")
    shared_library(library, *sources, options=(f"-I{SOURCES}",))
    function = ctypes.CDLL(str(library)).json_split
    function.restype = ctypes.c_size_t

    def split(body: bytes, ends: Sequence[int] = ()) -> Split:
        places = [*sorted(ends), len(body)]
        key, count = ctypes.create_string_buffer(8192), ctypes.c_size_t()
        counts, numbers = (ctypes.c_uint64 * (len(body) + 1))(), (ctypes.c_double * (len(body) + 1))()
        size = function(
            *(body, ctypes.c_size_t(len(body)), (ctypes.c_uint64 * len(places))(*places), ctypes.c_size_t(len(places))),
            *(key, counts, ctypes.byref(count), numbers),
        )
        if not size:
            return None
        found = list(counts[: count.value])
        return key.raw[:size], found, bytes(memoryview(numbers).cast("B")[: 8 * sum(found)])

    return split
