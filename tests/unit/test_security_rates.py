"""Rate limits: never more than was agreed, counted together by all who share a table."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.config import Config
from forno.server.errors import RateLimited
from forno.server.security import keys, rates
from forno.server.security.credentials import credential_of
from forno.server.security.guard import make
from forno.server.security.rates import Bucket, Table, address_of


def taken(buckets: list[Bucket], now_us: int = 0) -> int:
    """How many tokens there are, taken from each in turn."""
    count = 0
    with contextlib.suppress(RateLimited):
        while True:
            buckets[count % len(buckets)].take(now_us)
            count += 1
    return count


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("1.2.3.4:5", "1.2.3.4"),
        ("ipv4:1.2.3.4:5", "1.2.3.4"),
        ("[2001:db8:1:2:3::4]:5", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2:5::4%5D:5", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("[::ffff:1.2.3.4]:5", "1.2.3.4"),
        ("1.2.3.4", "1.2.3.4"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_an_address_is_one_client(peer, address):
    assert address_of(peer) == address


@given(
    rate=st.floats(0.5, 1000),
    burst=st.integers(1, 50),
    waits_us=st.lists(st.integers(0, 2_000_000), min_size=1, max_size=200),
)
def test_a_bucket_never_gives_more_than_its_rate_and_burst(rate, burst, waits_us):
    table = Table()
    buckets, now_us, given_calls = [Bucket(table, "a", rate, burst) for _ in range(3)], 0, 0
    for turn, wait_us in enumerate(waits_us):
        now_us += wait_us
        try:
            buckets[turn % 3].take(now_us)
        except RateLimited:
            continue
        given_calls += 1
    assert given_calls <= burst + rate * now_us / 1e6 + 1e-6 * len(waits_us) + 1


def test_processes_that_share_a_file_count_together(tmp_path):
    tables = [Table(tmp_path / "rates") for _ in range(3)]
    buckets = [Bucket(table, "a", 10.0, 30) for table in tables]
    others = [Bucket(table, "b", 10.0, 30) for table in tables]
    assert taken(buckets) == 30
    assert taken(buckets, 500_000) == 5
    assert taken(others, 500_000) == 30
    assert taken([Bucket(Table(tmp_path / "rates"), "a", 10.0, 30)], 500_000) == 0  # one that has started since
    assert taken([Bucket(tables[0], "a", 20.0, 7)], 500_000) == 7  # another limit is another bucket
    assert (tmp_path / "rates").stat().st_mode & 0o777 == 0o600
    assert taken([Bucket(Table(), "a", 10.0, 30)]) == 30


@given(most=st.integers(1, 100), burst=st.integers(1, 40), now_us=st.integers(0, 10**15))
def test_tokens_can_be_taken_together(most, burst, now_us):
    table = Table()
    bucket = Bucket(table, "a", 7.0, burst)
    count = bucket.take(now_us, most)
    assert count == min(most, burst)
    assert taken([bucket], now_us) == burst - count


def test_guards_that_share_a_file_count_together(tmp_path):
    key = keys.add(tmp_path / "keys.yaml", "web", ["predict"])
    security = {"keys_file": str(tmp_path / "keys.yaml"), "rate_limit": {"calls_per_s": 0.001, "burst": 5}}
    config = Config.model_validate({"security": security})
    guards = [make(config, rates=tmp_path / "rates") for _ in range(3)]
    credential = credential_of([("x-api-key", key)], trusted=True)
    for turn in range(5):
        guards[turn % 3].admit("predict", credential, "")
    for guard in guards:
        with pytest.raises(RateLimited):
            guard.admit("predict", credential, "")


def test_a_flood_of_clients_forgets_those_that_have_most_left(monkeypatch):
    monkeypatch.setattr(rates, "ROWS", 8)
    table = Table()
    clients = [Bucket(table, str(number), 1.0, 10) for number in range(8)]
    for number, bucket in enumerate(clients):
        for _ in range(number + 1):
            bucket.take(0)
    Bucket(table, "new", 1.0, 10).take(0)
    assert [taken([bucket]) for bucket in reversed(clients)] == [2, 3, 4, 5, 6, 7, 8, 10]
    assert len(table.cells) == 2 * 8


@pytest.mark.parametrize(("calls_per_s", "burst"), [(1e-9, 10**9), (1e9, 1), (1e9, 10**9), (1e-300, 1)])
def test_the_oddest_limits_can_be_counted(calls_per_s, burst):
    bucket = Bucket(Table(), "a", calls_per_s, burst)
    for _ in range(min(burst, 3)):
        bucket.take(2**50)
    if burst == 1:
        with pytest.raises(RateLimited) as refused:
            bucket.take(2**50)
        assert 0 < refused.value.retry_after_s <= 3600
