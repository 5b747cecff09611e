"""What deploy/ tells the server to do, done: each container's command line and settings, and each metric asked for."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from typing import TYPE_CHECKING

import check_deploy
import numpy as np
import pytest
import yaml
from bench.process import free_port
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.forno_server import FORNO, ROOT, FornoServer, environment, forno
from tests.e2e.secured import Authority

from forno.client import Client

if TYPE_CHECKING:
    from pathlib import Path

TARGET_LABELS = {"job", "instance", "le"}  # Prometheus' own, and a histogram's


def commands() -> dict[str, tuple[list[str], str]]:
    """By where it stands: a container's arguments, and its forno.yaml."""
    compose = yaml.safe_load((check_deploy.DEPLOY / "compose.yaml").read_text())
    found = {"compose.yaml": (compose["services"]["forno"]["command"], "")}
    [command] = re.findall(r"^CMD (.*)$", (check_deploy.DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    found["Dockerfile"] = (json.loads(command), "")
    groups = {path.name: check_deploy.documents(path.read_text()) for path in check_deploy.MANIFESTS}
    if check_deploy.tool("helm"):
        groups |= {f"chart, {path.name}": check_deploy.render(path) for path in check_deploy.values_files()}
    for place, made in groups.items():
        settings = [one["data"]["forno.yaml"] for one in made if "forno.yaml" in one.get("data", {})]
        for one in made:
            spec = one.get("spec", {}).get("template", {}).get("spec") or one.get("spec", {})
            if one["kind"] in {"Deployment", "ServingRuntime"}:
                found[place] = (spec["containers"][0]["args"], settings[0] if settings else "")
    return found


COMMANDS = commands()


def here(text: str, folder: Path, ports: dict[str, int]) -> str:
    """A container's text with this machine's places and ports in it."""
    places = {
        "/etc/forno/config/forno.yaml": folder / "forno.yaml",
        "/etc/forno/forno.yaml": folder / "forno.yaml",
        "/etc/forno/tls": folder,
        "/etc/forno/keys": folder,
        "/models/forno.yaml": ROOT / "examples" / "forno.yaml",
        "/mnt/models": ROOT / "examples" / "models" / "spam" / "1",
        "/models": ROOT / "examples" / "models",
        "{{.Name}}": "spam",
    }
    for there, place in places.items():
        text = re.sub(rf"(?<![\w/]){re.escape(there)}(?![\w])", str(place), text)
    return re.sub(r"0\.0\.0\.0:(\d+)", lambda found: f"127.0.0.1:{ports.setdefault(found[1], free_port())}", text)


def fill(folder: Path) -> None:
    """What the chart's secrets hold."""
    authority = Authority()
    certificate, key = authority.issue_server()
    files = {"tls.crt": certificate, "tls.key": key, "ca.crt": authority.certificate}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    done = forno("keys", "add", "--file", folder / "keys.yaml", "--name", "a", "--scope", "predict")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("place", COMMANDS)
def test_a_container_serves_and_ends_as_its_probes_and_its_grace_expect(place, tmp_path):
    arguments, settings = COMMANDS[place]
    ports: dict[str, int] = {}  # of the container -> here
    (tmp_path / "forno.yaml").write_text(here(settings, tmp_path, ports))
    command = [*FORNO, *(here(word, tmp_path, ports) for word in arguments)]
    if "/etc/forno/tls" in settings:
        fill(tmp_path)
    probed = f"127.0.0.1:{ports.get('9090') or next(iter(ports.values()))}"
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            end = time.monotonic() + 30
            while (done := forno("health", "--address", probed)).returncode:
                assert server.poll() is None, server.communicate()[0]
                assert time.monotonic() < end, done.stderr
            assert done.stdout == "SERVING\n"
            if "transport: grpc" not in settings:
                for path in ("health", "metrics"):  # the liveness probe, and the scrape
                    with urllib.request.urlopen(f"http://{probed}/{path}") as answer:
                        assert answer.status == 200
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
            assert time.monotonic() - began < 10  # nothing was in flight
        finally:
            if server.poll() is None:
                server.kill()


def test_health_says_why_not():
    done = forno("health", "--address", f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "no server answers at 127.0.0.1" in done.stderr


def test_health_of_one_model(server):
    known = forno("health", "spam", "--address", server.target)
    assert (known.returncode, known.stdout) == (0, "SERVING\n")
    unknown = forno("health", "nobody", "--address", server.target)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert f"{server.target} has no model 'nobody'" in unknown.stderr


def expressions() -> list[str]:
    """All PromQL in deploy/."""
    rules = yaml.safe_load(check_deploy.ALERTS.read_text())
    dashboard = json.loads((check_deploy.CHART / "files" / "dashboard.json").read_text())
    return [
        *(rule["expr"] for group in rules["groups"] for rule in group["rules"]),
        *(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])),
        *(variable["query"]["query"] for variable in dashboard["templating"]["list"] if "definition" in variable),
    ]


def test_alerts_and_dashboard_ask_for_what_the_server_exports(tmp_path):
    settings = tmp_path / "forno.yaml"
    settings.write_text(
        "models: {echo: {engine: 'null', cache: {max_bytes: 65536}, padding: {enabled: true, axes: {x: [1]}}}}"
    )
    with FornoServer(settings) as server:
        with Client(server.target) as client:
            client.predict("echo", {"x": np.zeros((1, 3), np.float32)})
        text = server.http("GET", "/metrics").body.decode()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set(TARGET_LABELS)).update(sample.labels)
    labels["up"] = TARGET_LABELS
    asked = expressions()
    assert len(asked) > 30
    for expression in asked:
        names = re.findall(r"\b(?:forno|process)_[a-z0-9_]+|\bup\b", expression)
        assert names, expression
        assert [name for name in names if name not in labels] == [], expression
        for name, matchers in re.findall(r"\b((?:forno|process)_[a-z0-9_]+|up)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= labels[name], expression
        known = set.union(*(labels[name] for name in names))
        for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {label.strip() for label in grouped.split(",")} <= known, expression
