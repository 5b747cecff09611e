"""Rate limits: a token bucket a client, in a bounded table."""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv6Address, ip_address

from forno.server.errors import RateLimited

MAX_BUCKETS = 10_000
"""Clients whose rate is remembered; those that have called least recently are forgotten first."""

_LARGEST_S = 3600.0  # what a caller is told to wait at most


class Bucket:
    """A token bucket, kept as the one number that says all (GCRA, ITU-T I.371): when it would be full again.

    Args:
        calls_per_s: Tokens that come in a second; more than 0.
        burst: Tokens that it holds; 1 or more.
    """

    __slots__ = ("_full_at_us", "_interval_us", "_tolerance_us", "calls_per_s")

    def __init__(self, calls_per_s: float, burst: int) -> None:
        self.calls_per_s = calls_per_s
        self._interval_us = 1e6 / calls_per_s
        self._tolerance_us = (burst - 1) * self._interval_us
        self._full_at_us = 0.0

    def take(self, now_us: int) -> None:
        """Takes one token.

        Raises:
            RateLimited: There is none; says when there will be.
        """
        self.look(now_us)
        self._full_at_us = max(self._full_at_us, now_us) + self._interval_us

    def look(self, now_us: int) -> None:
        """As `take`, but leaves the token.

        Raises:
            RateLimited: There is none.
        """
        short_us = self._full_at_us - now_us - self._tolerance_us
        if short_us > 0:
            raise RateLimited(
                f"over the limit of {self.calls_per_s:g} calls a second for one client", min(short_us / 1e6, _LARGEST_S)
            )


class Buckets:
    """The buckets of all clients, by name. Owned by the guard; event loop only."""

    def __init__(self, max_buckets: int = MAX_BUCKETS) -> None:
        self._max_buckets = max_buckets
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def of(self, client: str, calls_per_s: float, burst: int) -> Bucket | None:
        """The bucket of a client; None where the limit is 0, which is none.

        Args:
            client: Its name.
            calls_per_s: Its limit; a bucket of another limit is replaced.
            burst: Calls that may come at once; 0 = those of one second.
        """
        if not calls_per_s:
            return None
        bucket = self._buckets.get(client)
        if bucket is None or bucket.calls_per_s != calls_per_s:
            bucket = self._buckets[client] = Bucket(calls_per_s, burst or max(1, round(calls_per_s)))
            while len(self._buckets) > self._max_buckets:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(client)
        return bucket

    def __len__(self) -> int:
        return len(self._buckets)


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
