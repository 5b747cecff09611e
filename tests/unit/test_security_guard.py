"""The guard: who may come in, by which door, how often, and what changes while the server runs."""

from __future__ import annotations

import logging

import pytest

from forno.server.config import Config
from forno.server.errors import ConfigError, PermissionDenied, RateLimited, Unauthenticated
from forno.server.security import access, keys, methods
from forno.server.security import known as known_credentials
from forno.server.security.access import Principal
from forno.server.security.credentials import credential_of
from forno.server.security.exposure import why_open
from forno.server.security.guard import Guard, make, renew
from forno.server.security.scopes import Scopes
from forno.server.server import Server

PEER = "127.0.0.1:5000"
SECOND_US = 1_000_000


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self):
        self.us = SECOND_US

    def __call__(self):
        return self.us

    def time_s(self):
        return 1_800_000_000 + self.us / 1e6


def guard_of(security: dict, clock: Clock | None = None, *, loopback: bool = True) -> Guard:
    clock = clock or Clock()
    settings = Config.model_validate({"security": security}).security
    return Guard(settings, loopback=loopback, clock_us=clock, time_s=clock.time_s)


def shown(key: str = "", **headers: str) -> str:
    pairs = [("x-api-key", key)] if key else []
    pairs += [(name.replace("_", "-"), value) for name, value in headers.items()]
    return credential_of(pairs, trusted=True)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.yaml"


def test_without_settings_there_is_no_guard():
    assert make(Config()) is None
    assert make(Config(), "0.0.0.0:80").admission("/some.Other/Method") == "admin"


def test_every_method_of_a_server_says_what_it_needs():
    class Host:
        grpc = None
        paths: set[str] = set()  # noqa: RUF012

        def add_generic_rpc_handlers(self, handlers): ...

        def add_registered_method_handlers(self, service, handlers):
            self.paths |= {f"/{service}/{name}" for name in handlers}

    host = Host()
    host.grpc = host
    Server(Config(), [], "127.0.0.1:1", rest=True, show=None)._mount(host, None)
    assert host.paths - set(methods.NEEDS) == set()
    assert methods.need("/some.Other/Method") == "admin"


def test_off_loopback_without_credentials_only_administration_is_closed():
    guard = guard_of({}, loopback=False)
    assert {path for path in methods.NEEDS if guard.admission(path)} == set()
    assert guard.admission("/forno.v1.Admin/Load") == "admin"
    with pytest.raises(Unauthenticated):
        guard.admit("admin", "", PEER)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({}, False),
        ({"server": {"address": "0.0.0.0:80"}}, True),
        ({"server": {"address": "0.0.0.0:80"}, "security": {"keys_file": "k"}}, False),
        ({"server": {"address": "0.0.0.0:80"}, "security": {"anonymous": ["predict"]}}, False),
        ({"server": {"address": "[::1]:80"}}, False),
        ({"server": {"address": "127.1.2.3:80"}}, False),
        ({"server": {"address": "127.example.com:80"}}, True),
        ({"server": {"address": "localhost:80"}}, False),
    ],
)
def test_warns_where_everyone_is_answered(settings, warns):
    assert bool(why_open(Config.model_validate(settings))) == warns


def test_a_key_may_what_its_scopes_say(file):
    key = keys.add(file, "web", ["predict:model/spam", "predict:endpoint/spam/*"])
    guard = guard_of({"keys_file": str(file)})
    principal = guard.admit("predict", shown(key), PEER)
    assert guard.admit("predict", shown(authorization=f"bearer {key}"), PEER).name == principal.name
    rights = ["model/spam", "endpoint/spam/detect", "health", "model/spam2", "endpoint/spam", "model/", "admin"]
    assert [right for right in rights if principal.may(right)] == rights[:3]
    with pytest.raises(PermissionDenied):
        guard.admit("metrics", shown(key), PEER)


@pytest.mark.parametrize(
    "credential",
    [
        "",
        shown("forno_00000000_x"),
        shown("x"),
        shown(authorization="Basic eDp5"),
        shown(authorization="forno_1"),
        shown("forno_1_2", authorization="Bearer forno_1_3"),
        shown(x_forno_door="admin"),
        shown(x_forwarded_client_cert="URI=spiffe://x"),
    ],
)
def test_nobody_else_comes_in(file, credential):
    keys.add(file, "web", ["*"])
    guard = guard_of({"keys_file": str(file)})
    with pytest.raises(Unauthenticated):
        guard.admit("predict", credential, PEER)


def test_a_changed_key_is_no_key(file):
    key = keys.add(file, "web", ["*"])
    guard = guard_of({"keys_file": str(file)})
    for at in range(len(key)):
        other = key[:at] + ("A" if key[at] != "A" else "B") + key[at + 1 :]
        with pytest.raises((Unauthenticated, RateLimited)):
            guard.admit("predict", shown(other), f"10.0.{at}.1:1")
    assert guard.admit("predict", shown(key), PEER)


def test_guesses_of_one_address_are_slowed_down(file):
    key = keys.add(file, "web", ["*"])
    clock = Clock()
    guard = guard_of({"keys_file": str(file)}, clock)
    guard.admit("predict", shown(key), PEER)
    refusals = []
    for number in range(1050):
        with pytest.raises((Unauthenticated, RateLimited)) as told:
            guard.admit("predict", shown(f"forno_0_{number}"), PEER)
        refusals.append(told.type)
    assert refusals == [Unauthenticated] * 1000 + [RateLimited] * 50
    assert guard.admit("predict", shown(key), PEER)  # known already, and so not held up
    clock.us += SECOND_US
    with pytest.raises(Unauthenticated):
        guard.admit("predict", shown("forno_0_0"), PEER)


def test_keys_come_and_go_while_it_runs(file, caplog):
    clock = Clock()
    old = keys.add(file, "old", ["predict"])
    guard = guard_of({"keys_file": str(file)}, clock)
    principal = guard.admit("predict", shown(old), PEER)
    new = keys.add(file, "new", ["predict:model/a"])
    assert guard.admit("predict", shown(new), PEER).may("model/a")  # at once
    assert principal.next_item().name == principal.name  # a stream goes on, under what the file says now
    keys.remove(file, "old")
    clock.us += SECOND_US  # it looks once a second
    with pytest.raises(Unauthenticated):
        guard.admit("predict", shown(old), PEER)
    with pytest.raises(Unauthenticated):
        principal.next_item()
    with caplog.at_level(logging.ERROR, "forno.security"):
        file.write_text("keys: {x: {name: 1}}")
        clock.us += SECOND_US
        assert guard.admit("predict", shown(new), PEER)  # what cannot be read changes nothing
        clock.us += SECOND_US
        guard.admit("predict", shown(new), PEER)
    assert len(caplog.records) == 1


def test_a_key_ends_when_its_time_has_come(file):
    clock = Clock()
    key = keys.add(file, "web", ["predict"], expires="2027-01-15T08:00:11Z")  # 10 s after the clock's start
    guard = guard_of({"keys_file": str(file)}, clock)
    principal = guard.admit("predict", shown(key), PEER)
    clock.us += 9 * SECOND_US
    principal.next_item()
    clock.us += SECOND_US
    with pytest.raises(Unauthenticated, match="expired"):
        guard.admit("predict", shown(key), PEER)
    with pytest.raises(Unauthenticated, match="expired"):
        principal.next_item()


def test_a_client_has_its_own_limit(file):
    clock = Clock()
    slow = keys.add(file, "slow", ["predict"], calls_per_s=1.0, burst=2)
    plain = keys.add(file, "plain", ["predict"])
    guard = guard_of({"keys_file": str(file), "rate_limit": {"calls_per_s": 1000}, "anonymous": ["predict"]}, clock)
    guard.admit("predict", shown(slow), PEER)
    principal = guard.admit("predict", shown(slow), PEER)
    with pytest.raises(RateLimited) as told:
        principal.next_item()
    assert told.value.retry_after_s == 1.0
    for _ in range(1000):
        guard.admit("predict", shown(plain), PEER)
        guard.admit("predict", "", "10.0.0.1:1")
    for credential, peer in ((shown(plain), PEER), ("", "10.0.0.1:2")):
        with pytest.raises(RateLimited):
            guard.admit("predict", credential, peer)
    guard.admit("predict", "", "10.0.0.2:1")
    clock.us += SECOND_US
    guard.admit("predict", shown(slow), PEER)


def test_items_of_a_caller_without_a_credential_count_against_its_address():
    guard = guard_of({"rate_limit": {"calls_per_s": 1, "burst": 3}})
    streams = [guard.admit("predict", "", peer) for peer in ("10.0.0.1:1", "10.0.0.1:2", "10.0.0.2:1")]
    streams[0].next_item()
    for stream in streams[:2]:
        with pytest.raises(RateLimited):
            stream.next_item()
    streams[2].next_item()


def test_a_stream_sees_a_change_of_the_keys_though_no_other_call_comes(file):
    clock = Clock()
    key = keys.add(file, "one", ["predict"])
    principal = guard_of({"keys_file": str(file)}, clock).admit("predict", shown(key), PEER)
    keys.remove(file, "one")
    assert principal.next_item() is principal  # files are looked at once a second
    clock.us += SECOND_US
    with pytest.raises(Unauthenticated):
        principal.next_item()


def test_the_admin_door(file):
    key = keys.add(file, "all", ["*"])
    guard = guard_of({"keys_file": str(file), "admin_address": "127.0.0.1:9000"})
    for need in ("metrics", "reflection", "admin"):
        with pytest.raises(PermissionDenied):
            guard.admit(need, shown(key), PEER)
        assert guard.admit(need, shown(key, x_forno_door="admin"), PEER)
        assert guard.admit(need, shown(x_forno_door="admin"), PEER).anonymous
    assert guard.admit("predict", shown(key), PEER)


def test_names_that_a_caller_chooses_do_not_fill_the_memory(file):
    keys.add(file, "web", ["predict"])
    guard = guard_of({"keys_file": str(file), "anonymous": ["predict"]})
    for number in range(20):
        guard.admit("predict", shown(x_forno_peer=f"{'1' * 5000}{number}"), PEER)
    assert len(guard._known) == 0
    known = known_credentials.Known()
    for number in range(20_000):
        known.add(str(number), principal := Principal("x", Scopes(()), Clock(), access.Epoch(lambda _: 0, 0)))
    assert len(known) == known_credentials.MAX_KNOWN
    assert known.get("0") is None
    for number in range(2000):
        known.add(f"{number:016000}", principal)
    assert len(known) * 16_000 <= known_credentials.MAX_KNOWN_CHARS < (len(known) + 2) * 16_000
    principal = guard.admit("predict", "", PEER)
    for number in range(3000):
        principal.may(f"model/{number}")
    assert len(principal._verdicts) == 1024


def test_outside_of_calls_nothing_is_refused():
    access.check("model", "any")
    assert access.visible("model", ["a"]) == ["a"]
    assert access.sees("endpoint", "b")
    access.next_item()


@pytest.mark.parametrize("text", ["", "predict:", "predict:model", "predict:model/", "predict:x/y", "Admin", "**"])
def test_what_is_no_scope_is_refused(text):
    with pytest.raises(ValueError, match="is not a scope; expected"):
        Scopes([text])
    with pytest.raises(ConfigError, match=r"security\.anonymous: "):
        guard_of({"anonymous": [text]})


def test_a_missing_keys_file_says_how_to_make_it(tmp_path):
    with pytest.raises(ConfigError, match="forno keys add --file"):
        guard_of({"keys_file": str(tmp_path / "none.yaml")})


def test_a_guard_that_becomes_another_asks_for_what_that_one_does_in_streams_too(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    stays = keys.add(first, "stays", ["predict", "metrics"])
    second.write_text(first.read_text().replace(', "metrics"', ""))
    goes = keys.add(first, "goes", ["predict"])
    clock = Clock()
    guard = guard_of({"keys_file": str(first)}, clock)
    streams = [guard.admit("predict", shown(key), PEER) for key in (stays, goes)]
    guard.admit("metrics", shown(stays), PEER)
    limited = {"keys_file": str(second), "rate_limit": {"calls_per_s": 1.0, "burst": 2}}
    guard.become(guard_of(limited, clock))
    with pytest.raises(PermissionDenied):
        guard.admit("metrics", shown(stays), PEER)
    with pytest.raises(Unauthenticated):
        streams[1].next_item()
    streams[0].next_item()
    with pytest.raises(RateLimited):
        [guard.admit("predict", shown(stays), PEER) for _ in range(3)]
    clock.us += 10 * SECOND_US
    keys.add(second, "later", ["predict"])  # the new file is looked at from now on
    assert guard.admit("predict", shown(stays), PEER).name.startswith("key ")


def test_a_running_server_takes_over_no_settings_that_open_or_close_other_methods(file):
    keys.add(file, "one", ["predict"])
    closed = {"security": {"keys_file": str(file)}}
    configs = [Config(), *(Config.model_validate({**closed, "telemetry": {"sample_ratio": x}}) for x in (0.0, 0.5))]
    for before, after, renewed in ((0, 1, False), (1, 0, False), (1, 2, True)):
        current = make(configs[before])
        config, fresh, kept = renew(current, configs[before], configs[after], "127.0.0.1:1")
        assert (bool(fresh), kept) == (renewed, () if renewed else ("security",))
        assert config.security == configs[before].security
        assert config.telemetry == configs[after].telemetry


def test_a_caller_is_asked_before_its_message_comes(file):
    key, pages = keys.add(file, "web", ["predict"]), keys.add(file, "pages", ["metrics"])
    clock = Clock()
    guard = guard_of({"keys_file": str(file), "rate_limit": {"calls_per_s": 1, "burst": 2}}, clock)
    forgotten = []
    guard.on_change = lambda: forgotten.append(clock.us)
    assert not guard.knows("predict", shown(key))
    for _ in range(5):
        assert guard.ask("predict", shown(key), PEER)  # which counts nothing
    assert guard.knows("predict", shown(key))
    assert not guard.knows("metrics", shown(key))
    for credential, need, error in (
        ("", "predict", Unauthenticated),
        (shown("forno_00000000_x"), "predict", Unauthenticated),
        (shown(pages), "predict", PermissionDenied),
        (shown(key), "metrics", PermissionDenied),
    ):
        with pytest.raises(error):
            guard.ask(need, credential, PEER)
    assert not guard.knows("predict", "")
    assert guard.knows("health", "")
    assert not guard.ask("health", shown(x_forno_peer="1" * 5000), PEER)  # too long to be remembered
    principal = guard.admit("predict", shown(key), PEER)
    assert (principal.take(5), principal.take(5), principal.take(0)) == (1, 0, 0)
    with pytest.raises(RateLimited):
        guard.ask("predict", shown(key), PEER)
    clock.us += SECOND_US
    keys.remove(file, "web")
    assert forgotten == []
    with pytest.raises(Unauthenticated):
        guard.ask("predict", shown(key), PEER)
    assert forgotten == [clock.us]
