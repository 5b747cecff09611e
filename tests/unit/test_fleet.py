"""What a fleet decides: cores of replicas, waits before starts, what metrics add up to, which calls go where."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from forno.server.cli.fleet import _ranges
from forno.server.config import FleetSettings
from forno.server.errors import ConfigError
from forno.server.fleet import control_socket, exposition
from forno.server.fleet import edge as edges
from forno.server.fleet.place import Backoff
from forno.server.fleet.placement import Placement, place
from forno.server.metrics import Metrics
from forno.server.transport.envoy import bootstrap, ends

AUTO = FleetSettings(replicas=3)


@given(st.integers(1, 40), st.lists(st.integers(0, 255), min_size=1, max_size=64, unique=True))
def test_replicas_share_all_cores_and_none_twice(count, cpus):
    cpus = sorted(cpus)
    places = [place(index, count, cpus, AUTO) for index in range(count)]
    if len(cpus) >= count:
        assert [cpu for one in places for cpu in one.cpus] == cpus
        assert max(len(one.cpus) for one in places) - min(len(one.cpus) for one in places) <= 1
        assert all(one.threads == len(one.cpus) for one in places)
    else:
        assert all(one == Placement(tuple(cpus), 1, None) for one in places)


def test_gpus_are_dealt_in_turn():
    settings = FleetSettings(replicas=3, gpus=("0", "1"), pin_cpus=False)
    assert [place(index, 3, [0, 1], settings).gpus for index in range(3)] == ["0", "1", "0"]
    environment = place(1, 3, [0, 1], settings).environment()
    assert environment == {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "1",
    }


def test_a_replica_that_keeps_ending_is_started_ever_later():
    backoff = Backoff(most_s=1.0)
    waits = []
    for _ in range(6):
        waits.append(backoff.wait_s())
        backoff.ended(ran_s=0.5)
    assert waits == [0.0, 0.1, 0.2, 0.4, 0.8, 1.0]
    backoff.ended(ran_s=60.0)
    assert backoff.wait_s() == 0.0


@pytest.mark.parametrize("header", ["X-Session", "a b", "x:y"])
def test_a_header_that_is_none_is_refused(header):
    with pytest.raises(ValueError, match="affinity_header"):
        FleetSettings(affinity_header=header)


def test_calls_that_may_be_made_again_exist():
    described = FileDescriptorSet.FromString(bootstrap.DESCRIPTORS.read_bytes())
    methods = {
        f"/{file.package}.{service.name}/{method.name}"
        for file in described.file
        for service in file.service
        for method in service.method
    }
    assert set(edges.IDEMPOTENT) <= methods
    assert {path for path in edges.OWN if path.startswith("/forno.")} <= methods
    streams = {
        f"/{file.package}.{service.name}/{method.name}"
        for file in described.file
        for service in file.service
        for method in service.method
        if method.client_streaming or method.server_streaming
    }
    assert not streams & set(edges.IDEMPOTENT)


def test_only_what_changes_nothing_is_made_again_after_it_may_have_begun():
    routes = edges.EdgeEnd(Path("/x"), "", rest=True).routes()
    retried = {
        route["match"].get("path") or route["match"]["prefix"]: route["route"]["retry_policy"]["retry_on"]
        for route in routes
        if "retry_policy" in route.get("route", {})
    }
    past = retried.pop("/v1/")  # REST calls that need no transcoder, of methods that change nothing
    assert past == "connect-failure,refused-stream,retriable-status-codes,reset"
    assert set(ends.HTTP_ROUTES) <= set(edges.IDEMPOTENT)
    assert {path for path, on in retried.items() if "reset" in on or "unavailable" in on} == set(edges.IDEMPOTENT)
    assert retried["/"] == "connect-failure,refused-stream"


def test_the_list_of_replicas_is_replaced_whole(tmp_path):
    (tmp_path / edges.XDS_FOLDER).mkdir()
    replicas = [SimpleNamespace(index=index, socket=tmp_path / f"{index}.sock") for index in range(2)]
    edges.publish(tmp_path, 7, [(replicas[0], True), (replicas[1], False)])
    document = json.loads((tmp_path / edges.XDS_FOLDER / "replicas.json").read_text())
    endpoints = document["resources"][0]["endpoints"][0]["lb_endpoints"]
    assert [one["health_status"] for one in endpoints] == ["UNKNOWN", "DRAINING"]
    assert document["version_info"] == "7"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["replicas.json"]


@pytest.mark.parametrize(
    ("health", "takes_calls"),
    [
        ({"eds_health_status": "HEALTHY"}, True),
        ({"eds_health_status": "DRAINING"}, False),
        ({"eds_health_status": "HEALTHY", "failed_active_health_check": True}, False),
        ({"eds_health_status": "HEALTHY", "pending_active_hc": True}, False),
    ],
)
def test_the_edge_s_view_of_a_replica_is_read(health, takes_calls):
    host = {
        "address": {"pipe": {"path": "/a.sock"}},
        "health_status": health,
        "stats": [{"name": "rq_active", "value": "2"}, {"name": "rq_total", "value": "9"}, {"name": "cx_total"}],
    }
    clusters = {"cluster_statuses": [{"name": "pages"}, {"name": "replicas", "host_statuses": [host]}]}
    assert edges.views(json.dumps(clusters)) == {"/a.sock": edges.HostView(takes_calls, 2, 9)}
    assert edges.views("") == {}


def exposed(calls: int, waiting: float) -> dict[str, exposition.Family]:
    """The metrics of a server that has answered so many calls."""
    metrics = Metrics()
    model = metrics.model("spam", 'a "b"\\c')
    for _ in range(calls):
        model.batch([10], [2000], 1, 1500)
    metrics.rpc("/a/B", "OK", calls)
    metrics.watch(lambda: [("forno_pending_rows", {"model": "spam"}, waiting), ("forno_batch_rows_limit", {}, 32.0)])
    return exposition.parse(metrics.prometheus().decode())


def values(text: str) -> dict[tuple[str, str], float]:
    """Every sample, by name and replica, of a text that Prometheus' own parser reads; labels added up."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("replica", "")
            found[key] = found.get(key, 0.0) + sample.value
    return found


def test_metrics_of_replicas_stand_beside_their_sums():
    sums = exposition.Sums()
    families = {0: exposed(3, 1.0), 1: exposed(4, 2.5)}
    for index, own in families.items():
        sums.remember(f"{index}-0", own)
    found = values(exposition.render(families, sums.total(["0-0", "1-0"])))
    assert found["forno_rpcs_total", "0"] == 3
    assert found["forno_rpcs_total", "1"] == 4
    assert found["forno_fleet_rpcs_total", ""] == 7
    assert found["forno_fleet_request_seconds_count", ""] == 7
    assert math.isclose(found["forno_fleet_request_seconds_sum", ""], 0.014)
    assert found["forno_fleet_pending_rows", ""] == 3.5
    assert found["forno_batch_rows_limit", "1"] == 32
    assert ("forno_fleet_batch_rows_limit", "") not in found
    assert ("process_open_fds", "0") in found


def test_a_replica_that_ends_takes_nothing_from_the_sums():
    sums = exposition.Sums()
    sums.remember("0-0", exposed(3, 1.0))
    sums.remember("1-0", exposed(4, 2.0))
    sums.total(["0-0", "1-0"])
    sums.remember("0-0", exposed(5, 1.0))  # its last words
    for _ in range(2):
        found = values(exposition.render({1: exposed(4, 2.0)}, sums.total(["1-0"])))
        assert found["forno_fleet_rpcs_total", ""] == 9
        assert found["forno_fleet_pending_rows", ""] == 2


def test_control_sockets_lie_where_only_their_owner_may_go(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="no fleet of yours runs; it is started by: forno serve"):
        control_socket.find(None)
    path = control_socket.path_of("[::1]:8080")
    assert path.name == "_1_8080.sock"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="no fleet of yours runs at h:1"):
        control_socket.find("h:1")
    for name in ("a", "b"):
        (path.parent / f"{name}.sock").touch()
    with pytest.raises(ConfigError, match="several fleets run: a, b; say which"):
        control_socket.find(None)
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="not a folder of yours alone"):
        control_socket.folder()


def test_cores_are_written_as_people_write_them():
    assert _ranges([3, 0, 1, 2, 8, 10, 11]) == "0-3,8,10-11"
    assert _ranges([]) == "-"
