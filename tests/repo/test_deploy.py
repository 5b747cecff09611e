"""deploy/ says what the server says: its ports, probes, times, services, metrics and versions."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import build_native
import check_deploy
import pytest
import yaml

from forno.server.config import Config
from forno.server.metrics import HELP
from forno.v1 import predictor_pb2, rest_pb2

DEPLOY = check_deploy.DEPLOY
CHART = check_deploy.CHART
PROMETHEUS = [check_deploy.ALERTS, check_deploy.ALERT_TESTS, DEPLOY / "prometheus" / "adapter.yaml"]
DASHBOARD = CHART / "files" / "dashboard.json"
# What the supervisor allows itself at the end: 5 s past the drain, 2 s for answers to leave, 10 s for Envoy to go.
AFTER_DRAIN_S = 17
SERVICES = {
    *(f"forno.v1.{name}" for name in predictor_pb2.DESCRIPTOR.services_by_name),
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}


def version() -> str:
    return str(tomllib.loads((check_deploy.ROOT / "pyproject.toml").read_text())["project"]["version"])


def manifests() -> list[tuple[str, dict]]:
    return [(path.name, one) for path in check_deploy.MANIFESTS for one in check_deploy.documents(path.read_text())]


def rendered() -> list[tuple[str, dict]]:
    """What the chart makes of every set of values; nothing where there is no helm."""
    if check_deploy.tool("helm") is None:
        return []
    return [(values.name, one) for values in check_deploy.values_files() for one in check_deploy.render(values)]


@pytest.fixture(scope="module")
def found() -> list[tuple[str, dict]]:
    return manifests() + rendered()


def pods(found: list[tuple[str, dict]]) -> list[tuple[str, dict, dict]]:
    """Deployments as (where, settings, pod)."""
    pods = []
    for place, one in found:
        if one["kind"] == "Deployment":
            [settings] = [
                yaml.safe_load(other["data"]["forno.yaml"])
                for where, other in found
                if where == place and other["kind"] == "ConfigMap" and "forno.yaml" in other["data"]
            ]
            pods.append((place, settings, one["spec"]["template"]["spec"]))
    return pods


def test_what_is_needed_to_render_the_chart_is_known_to_be_missing():
    if check_deploy.tool("helm") is None:
        pytest.skip("helm is not installed (make deploy-tools): the chart's own output is not tested")


def test_settings_in_manifests_are_settings_of_the_server(found):
    assert [Config.model_validate(settings) for _, settings, _ in pods(found)]


def test_every_pod_has_the_time_to_drain(found):
    for place, settings, pod in pods(found):
        drain_s = Config.model_validate(settings).server.drain_s
        [container] = pod["containers"]
        before_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] >= before_s + drain_s + AFTER_DRAIN_S, place


def test_every_container_is_probed_where_it_listens(found):
    containers = [(place, Config.model_validate(given), pod["containers"][0]) for place, given, pod in pods(found)]
    assert containers
    for place, config, container in containers:
        addresses = {"grpc": config.server.address, "admin": config.security.admin_address}
        ports = {name: int(address.rpartition(":")[2]) for name, address in addresses.items() if address}
        assert {listed["name"]: listed["containerPort"] for listed in container["ports"]} == ports, place
        probed = "admin" if "admin" in ports else "grpc"  # which stays plain when calls are encrypted
        probe = {"port": ports[probed]}
        assert container["startupProbe"]["grpc"] == container["readinessProbe"]["grpc"] == probe, place
        if config.server.transport == "grpc":  # it has no REST
            assert container["livenessProbe"]["grpc"] == probe, place
        else:
            assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": probed}, place


def test_no_pod_may_do_more_than_it_needs(found):
    for place, _, pod in pods(found):
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"], place
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert not pod["automountServiceAccountToken"], place
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, place
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], place
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), place


SELECTING = ("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment", "Server", "PeerAuthentication")


def test_selectors_meet_the_pods_that_they_are_for(found):
    labels: dict[str, dict[str, str]] = {
        place: one["spec"]["template"]["metadata"]["labels"] for place, one in found if one["kind"] == "Deployment"
    }
    assert labels
    for place, one in found:
        if one["kind"] in SELECTING:
            selector = one["spec"].get("podSelector") or one["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            given = labels.get(place, labels["workload.yaml"])  # which the meshes' files are applied with
            assert wanted.items() <= given.items(), f"{place}: {one['kind']} {one['metadata']['name']}"


def test_routes_and_policies_name_services_that_there_are(found):
    named = set()
    for _, one in found:
        text = json.dumps(one)
        if one["kind"] == "GRPCRoute":
            for rule in one["spec"]["rules"]:
                named |= {(match["method"]["service"], match["method"].get("method")) for match in rule["matches"]}
        elif one["kind"] in {"AuthorizationPolicy", "VirtualService"}:
            named |= {
                (service, None if method == "*" else method)
                for service, method in re.findall(r'"/([A-Za-z0-9_.]+)/([A-Za-z*]+)"', text)
            }
    methods = {method.name for method in predictor_pb2.DESCRIPTOR.services_by_name["Predictor"].methods}
    assert {service for service, _ in named} <= SERVICES
    assert {method for _, method in named if method} <= methods
    assert ("forno.v1.Predictor", "Predict") in named


def test_rest_routes_and_probes_name_paths_that_there_are(found):
    from google.api import annotations_pb2

    bound = set()
    for method in rest_pb2.DESCRIPTOR.services_by_name["Rest"].methods:
        rule = method.GetOptions().Extensions[annotations_pb2.http]
        bound |= {
            getattr(each, each.WhichOneof("pattern"))
            for each in (rule, *rule.additional_bindings)
            if each.WhichOneof("pattern") != "custom"
        }
    named = {"/metrics", "/health"}  # of ServiceMonitor, and of liveness probes
    for _, one in found:
        if one["kind"] == "HTTPRoute":
            named |= {match["path"]["value"] for rule in one["spec"]["rules"] for match in rule["matches"]}
    assert [path for path in named if not any(known == path or known.startswith(f"{path}/") for known in bound)] == []


def names_in(text: str) -> set[str]:
    """Metrics that PromQL, or a test of it, names; a histogram by its family."""
    found = set(re.findall(r"\b(?:forno|process)_[a-z0-9_]+", text))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


@pytest.mark.parametrize("path", [*PROMETHEUS, DASHBOARD, CHART / "templates" / "hpa.yaml"], ids=lambda path: path.name)
def test_every_metric_that_is_asked_for_is_exported(path):
    named = names_in(path.read_text())
    assert named
    assert named <= set(HELP)


def test_every_alert_has_a_test():
    alerts = {
        rule["alert"] for group in yaml.safe_load(check_deploy.ALERTS.read_text())["groups"] for rule in group["rules"]
    }
    tested = {
        case["alertname"]
        for test in yaml.safe_load(check_deploy.ALERT_TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert alerts == tested


def test_panels_of_the_dashboard_neither_overlap_nor_share_an_id():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_value_of_the_chart_is_used_and_every_use_has_a_value():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    paths = {
        f"{top}.{name}" if name else top
        for top, below in values.items()
        for name in (below if isinstance(below, dict) and below and top != "config" else [None])
    }
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*") if path.is_file())
    used = set(re.findall(r"\.Values\.([A-Za-z.]+)", templates))
    whole = {path.partition(".")[0] for path in used if "." not in path}  # as `toYaml .Values.resources`
    assert {path for path in paths if path not in used and path.partition(".")[0] not in whole} == set()
    assert {path for path in used if path not in paths and not path.startswith("config")} - set(values) == set()


def test_one_version_everywhere():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    images = {f"forno:{version()}"}
    assert {chart["version"], chart["appVersion"]} == {version()}
    assert compose["services"]["forno"]["image"] in images
    named = re.findall(
        r"\bforno:\d+\.[\w.-]*", "".join(path.read_text() for path in sorted(DEPLOY.rglob("*")) if path.is_file())
    )
    assert {name.removesuffix("-gpu") for name in named} == images


def test_compose_gives_the_time_to_drain():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["forno"]
    drain_s = math.ceil(float(service["environment"]["FORNO_SERVER__DRAIN_S"]))
    assert int(service["stop_grace_period"].removesuffix("s")) >= drain_s + AFTER_DRAIN_S


def dockerfile(name: str) -> str:
    """A Dockerfile with each command on one line."""
    return re.sub(r"\\\n\s*", "", (DEPLOY / name).read_text())


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_an_image_runs_without_root_and_starts_the_server(name):
    text = (DEPLOY / name).read_text()
    final = text.rpartition("\nFROM ")[2]
    assert 'CMD ["serve", "/models", "--address", "0.0.0.0:8080"]' in final  # which tests/e2e/test_deploy.py runs
    assert 'ENTRYPOINT ["forno"]' in final
    assert 'CMD ["forno", "health"]' in final
    assert "USER 10001:10001" in final
    assert "g++" not in final
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert [source for source in sources if not (check_deploy.ROOT / source).exists()] == []


def test_the_gpu_image_has_what_the_extra_has_but_for_what_its_base_brings():
    extras = tomllib.loads((check_deploy.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [re.sub(r"\[.*?\]|;.*", "", line) for line in extras["gpu"] if not line.startswith("forno[")]
    [command] = re.findall(r"pip install '\.\[.*?\]' ((?:'[^']+' )+)&&", dockerfile("Dockerfile.gpu"))
    assert shlex.split(command) == [line.strip() for line in wanted]


def test_the_library_of_python_is_compiled_into_the_image(tmp_path):
    for module in ("json", "idlelib"):
        (tmp_path / "lib" / module).mkdir(parents=True)
        (tmp_path / "lib" / module / "__init__.py").touch()
    final = dockerfile("Dockerfile").rpartition("\nFROM ")[2]
    [command] = re.findall(r"^RUN (python -m compileall .*)\"\$\(python .*\)\"$", final, re.MULTILINE)
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["sh", "-c", f"{command} {shlex.quote(str(tmp_path / 'lib'))}"], check=True)
    assert [path.parent.parent.name for path in tmp_path.rglob("*.pyc")] == ["json"]


def allowed(name: str) -> bool:
    """Whether .dockerignore lets a file into the build; of its rules, those that this repository uses."""
    chosen = False
    for line in (check_deploy.ROOT / ".dockerignore").read_text().splitlines():
        rule = line.removeprefix("!")
        if not rule or rule.startswith("#"):
            continue
        parts = Path(name).parts
        if rule == "*" or (rule.startswith("**/") and rule[3:] in parts) or name == rule or name.startswith(f"{rule}/"):
            chosen = line.startswith("!")
        else:
            assert not fnmatch.fnmatch(name, rule), f"this test does not understand {line}"
    return chosen


def test_the_image_is_built_from_all_that_a_wheel_needs(files, root, tmp_path):
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    for path in files:
        if allowed(name := str(path.relative_to(root))):
            target = tmp_path / "context" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    names = []
    for source in (root, tmp_path / "context"):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / source.name)]
        subprocess.run(
            command, cwd=source, check=True, capture_output=True, env={**os.environ, build_native.SKIP: "skip"}
        )
        wheel = next((tmp_path / source.name).glob("*.whl"))
        names.append(
            {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith((".so", ".for", "RECORD"))}
        )
    assert names[0] == names[1]


def test_mistakes_in_manifests_are_found():
    pytest.importorskip("kubernetes_validate", reason="not installed (make deploy-tools)")
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}]}}
    assert not list(check_deploy.complaints([service]))
    service["spec"]["ports"][0]["prot"] = "TCP"
    assert "prot" in next(check_deploy.complaints([service]))
    route = next(one for _, one in manifests() if one["kind"] == "GRPCRoute")
    assert not list(check_deploy.complaints([route]))
    route["spec"]["rules"][0]["match"] = []
    assert "'match' was unexpected" in next(check_deploy.complaints([route]))


ECHO = "config: {models: {echo: {engine: 'null'}}}\n"
ROUTED = ECHO + "gateway: {enabled: true, parentRefs: [{name: public}], %s}"
REFUSED = {
    "{}": "nothing to serve",
    ECHO + "replica: 2": "'replica' not allowed",
    "config: {server: {address: '127.0.0.1:8080'}, models: {a: {}}}": "/config/server/address",
    "config: {server: {transport: http}, models: {a: {}}}": "/config/server/transport",
    "config: {server: {transport: grpc}, models: {a: {}}}\nserviceMonitor: {enabled: true}": "needs REST",
    "config: {security: {admin_address: ''}, models: {a: {}}}\nsecrets: {tls: a}": "secrets.tls needs",
    ECHO + "gateway: {enabled: true}": "needs gateway.parentRefs",
    ROUTED % "grpcHostnames: []": "needs gateway.grpcHostnames or",
    ROUTED % "grpcHostnames: [a.b], httpHostnames: [a.b]": "one kind of route",
    ECHO + "autoscaling: {enabled: true, pendingRowsPerPod: 0}": "above 0",
}


@pytest.mark.parametrize(("values", "complaint"), REFUSED.items(), ids=REFUSED.values())
def test_values_that_cannot_be_are_refused_with_the_reason(values, complaint, tmp_path):
    if check_deploy.tool("helm") is None:
        pytest.skip("helm is not installed (make deploy-tools)")
    (tmp_path / "values.yaml").write_text(values)
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        check_deploy.render(tmp_path / "values.yaml")
    assert complaint in refusal.value.stderr


INSTALLS = re.findall(r"^helm install (.*)$", (check_deploy.ROOT / "docs" / "deploy.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("arguments", INSTALLS)
def test_installations_that_the_documentation_shows_render(arguments):
    helm = check_deploy.tool("helm")
    if helm is None:
        pytest.skip("helm is not installed (make deploy-tools)")
    command = [helm, "template", *shlex.split(arguments), "--kube-version", f"{check_deploy.KUBERNETES[0]}.0"]
    done = subprocess.run(command, cwd=check_deploy.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(check_deploy.complaints(check_deploy.documents(done.stdout)))
