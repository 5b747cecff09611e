"""Which settings a running server keeps."""

from __future__ import annotations

import logging

import pytest

from forno.server.config import Config
from forno.server.errors import ConfigError
from forno.server.fixed import keep, log_refused
from forno.server.plain import plain
from forno.server.transport.envoy import outside


@pytest.mark.parametrize("form", [lambda config: config, plain], ids=["checked", "plain"])
def test_what_envoy_and_sockets_were_started_with_is_kept_and_the_rest_changes(form):
    before = form(Config())
    told = {
        "server": {"max_call_s": 5, "socket_access": "all", "drain_s": 2, "log_level": "debug"},
        "models": {"m": {"engine": "null"}},
        "fleet": {"replicas": 3, "hung_after_s": 1},
        "security": {"rate_limit": {"calls_per_s": 5}, "admin_address": "127.0.0.1:1"},
        "telemetry": {"sample_ratio": 0.5},
    }
    after, kept = keep(before, form(Config.model_validate(told)))
    assert kept == [
        "fleet.replicas",
        "security.admin_address",
        "server.max_call_s",
        "server.socket_access",
        "telemetry.sample_ratio",
    ]
    assert (after.server.max_call_s, after.server.socket_mode, after.server.drain_s) == (600, 0o600, 2)
    assert after.security.rate_limit.calls_per_s == 5
    assert not after.security.admin_address
    assert list(after.models) == ["m"]


def test_a_fleet_changes_its_number_and_not_whether_it_is_one():
    before = Config.model_validate({"fleet": {"replicas": 2}})
    many = {"fleet": {"replicas": 5, "affinity_header": "x"}, "telemetry": {"sample_ratio": 0.5}}
    after, kept = keep(before, Config.model_validate(many))
    assert (after.fleet.replicas, after.telemetry.sample_ratio, kept) == (5, 0.5, ["fleet.affinity_header"])
    after, kept = keep(before, Config())
    assert (after.fleet.replicas, kept) == (2, ["fleet.replicas"])


def test_what_is_wrong_is_logged_line_by_line_and_what_was_not_foreseen_with_where_it_was(caplog):
    log_refused(logging.getLogger("forno"), ConfigError("models.a: no\nmodels.b: no"))
    assert [(one.message, one.exc_info) for one in caplog.records] == [
        ("not reloaded: models.a: no", None),
        ("not reloaded: models.b: no", None),
    ]
    caplog.clear()

    def read():
        raise OSError("the disk has gone")

    assert outside._reload(None, read, 7.0) == 7.0  # nothing is sent, and the server goes on
    [one] = caplog.records
    assert one.message == "not reloaded"
    assert "the disk has gone" in str(one.exc_info[1])
