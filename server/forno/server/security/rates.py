"""Rate limits: a token bucket a client, in a table of fixed size that all replicas of a fleet share."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

from forno.server.errors import RateLimited

if TYPE_CHECKING:
    from pathlib import Path

ROWS, _WAYS = 16_384, 8
"""Clients whose rate is remembered, and the rows among which one of them has its place."""

_ROW_BYTES = 16
_LARGEST_S = 3600.0  # what a caller is told to wait at most
_LARGEST_NS = 2**61


class Table:
    """Rows of two numbers: whose bucket it is, and when it will be full again. Any number of processes at once.

    A number is written whole, so that nobody locks and nobody is held up by a process that is stopped. Where two take a
    token of one bucket in the same microsecond, one token may not be counted.

    Args:
        path: The file that a fleet's processes share, made where there is none; None = this process alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.cells = memoryview(_shared(path) if path else bytearray(ROWS * _ROW_BYTES)).cast("q")

    def place(self, tag: int, at: int) -> int:
        """The row of a bucket: its own, or that of the one which is full soonest, which is then forgotten.

        Args:
            tag: What tells it from others.
            at: The first row that may be its own.

        Returns:
            The index of the row's first number.
        """
        cells, rows = self.cells, range(2 * at, 2 * (at + _WAYS), 2)
        for row in rows:
            if cells[row] == tag:
                return row
        found = min(rows, key=lambda row: cells[row + 1])  # most have been full for long: then nothing is lost
        cells[found] = tag
        cells[found + 1] = 0
        return found


def _shared(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, ROWS * _ROW_BYTES)  # what is there stays
        return mmap.mmap(descriptor, ROWS * _ROW_BYTES)
    finally:
        os.close(descriptor)


class Bucket:
    """A token bucket, kept as the one number that says all (GCRA, ITU-T I.371): when it would be full again.

    Args:
        table: Where that number stands.
        client: Whose it is; buckets of one client and one limit are one bucket.
        calls_per_s: Tokens that come in a second; more than 0.
        burst: Tokens that it holds; 1 or more.
    """

    __slots__ = ("_at", "_cells", "_first", "_interval_ns", "_table", "_tag", "_tolerance_ns", "calls_per_s")

    def __init__(self, table: Table, client: str, calls_per_s: float, burst: int) -> None:
        self.calls_per_s = calls_per_s
        self._interval_ns = min(max(1, round(1e9 / max(calls_per_s, 1e-9))), _LARGEST_NS // burst)
        self._tolerance_ns = (burst - 1) * self._interval_ns
        digest = hashlib.blake2b(f"{client}\0{calls_per_s}\0{burst}".encode(errors="replace"), digest_size=16).digest()
        self._tag = int.from_bytes(digest[:8], "little", signed=True) or 1
        self._first = int.from_bytes(digest[8:], "little") % (ROWS // _WAYS) * _WAYS
        self._table, self._cells = table, table.cells
        self._at = 2 * self._first

    def take(self, now_us: int, most: int = 1) -> int:
        """Takes tokens.

        Args:
            now_us: Monotonic.
            most: How many at most; 1 or more.

        Returns:
            How many there were; 1 or more.

        Raises:
            RateLimited: There is none; says when there will be.
        """
        full_at_ns = max(self.look(now_us), now_us * 1000)
        count = min(most, (now_us * 1000 + self._tolerance_ns - full_at_ns) // self._interval_ns + 1)
        self._cells[self._at + 1] = full_at_ns + count * self._interval_ns
        return count

    def look(self, now_us: int) -> int:
        """As `take`, but leaves the token.

        Returns:
            When the bucket would be full again, in nanoseconds.

        Raises:
            RateLimited: There is none.
        """
        cells = self._cells
        if cells[self._at] != self._tag:
            self._at = self._table.place(self._tag, self._first)
        full_at_ns = cells[self._at + 1]
        short_ns = full_at_ns - now_us * 1000 - self._tolerance_ns
        if short_ns > 0:
            raise RateLimited(
                f"over the limit of {self.calls_per_s:g} calls a second for one client", min(short_ns / 1e9, _LARGEST_S)
            )
        return full_at_ns


@functools.lru_cache(maxsize=1024)
def address_of(peer: str) -> str:
    """The client that an address stands for: the address, and of IPv6 the network of 64 bits that one host may use.

    Args:
        peer: As transports tell it: "1.2.3.4:5", "[::1]:5", "ipv4:1.2.3.4:5", "ipv6:%5B::1%5D:5" or "unix:".
    """
    text = peer.removeprefix("ipv4:").removeprefix("ipv6:").replace("%5B", "[").replace("%5D", "]")
    host = text[1:].partition("]")[0] if text.startswith("[") else text.rpartition(":")[0] if ":" in text else text
    try:
        address = ip_address(host if text.count(":") < 2 or text.startswith("[") else text)
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(IPv6Address(int(address) >> 64 << 64)) + "/64"
    return str(address)
