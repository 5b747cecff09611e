"""Checks deploy/ with the tools that would read it: no cluster, no daemon, no network.

Usage: `python tools/check_deploy.py`. A tool is taken from PATH or from the virtual environment (`make deploy-tools`
installs what the package indexes have); what is missing is skipped with a line that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "forno"
ALERTS = CHART / "files" / "alerts.yaml"
ALERT_TESTS = DEPLOY / "prometheus" / "alerts_test.yaml"
MANIFESTS = (*sorted((DEPLOY / "mesh").glob("*.yaml")), *sorted((DEPLOY / "kserve").glob("*.yaml")))
KUBERNETES = ("1.30", "1.37")
"""The oldest version that the chart says it runs on, and the newest with schemas."""
CUSTOM = DEPLOY / "schemas.yaml"


def tool(name: str) -> str | None:
    """Path of a tool, or None where it is not installed."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def values_files() -> list[Path]:
    """The sets of values that the chart is checked with."""
    return sorted((CHART / "ci").glob("*.yaml"))


def render(values: Path) -> list[dict[str, Any]]:
    """The objects that the chart makes of a set of values.

    Raises:
        FileNotFoundError: There is no helm.
        subprocess.CalledProcessError: helm refuses them; its `stderr` says why.
    """
    helm = tool("helm")
    if helm is None:
        raise FileNotFoundError("helm")
    # No version of Kubernetes is asked of a cluster, and nothing is read from the user's own settings.
    options = ["--namespace", "inference", "--kube-version", f"{KUBERNETES[0]}.0", "--values", str(values)]
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [helm, "template", "release", str(CHART), *options],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HELM_CONFIG_HOME": home, "HELM_CACHE_HOME": home, "HELM_DATA_HOME": home},
        )
    return documents(done.stdout)


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a YAML stream."""
    return [found for found in yaml.safe_load_all(text) if found]


def complaints(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What Kubernetes would refuse about objects: its own kinds by its own schemas, others by `CUSTOM`."""
    validator = importlib.import_module("kubernetes_validate")
    jsonschema = importlib.import_module("jsonschema")
    custom = yaml.safe_load(CUSTOM.read_text())
    for one in found:
        kind, name = f"{one['apiVersion']} {one['kind']}", one["metadata"]["name"]
        if kind in custom["kinds"]:
            schema = {**custom, "$ref": f"#/kinds/{kind.replace('/', '~1')}"}
            for error in jsonschema.Draft202012Validator(schema).iter_errors(one):
                yield f"{kind} {name}: {error.json_path}: {error.message}"
            if containers := one["spec"].get("containers"):  # as a pod has them
                pod = {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": one["metadata"],
                    "spec": {"containers": containers},
                }
                yield from complaints([pod])
            continue
        for version in KUBERNETES:
            try:
                validator.validate(one, version, strict=True)
            except validator.ValidationError as error:
                yield f"{kind} {name}: Kubernetes {version}: {error.message} at {'.'.join(map(str, error.path))}"
            except validator.SchemaNotFoundError:
                yield f"{kind} {name}: neither Kubernetes {version} nor {CUSTOM.name} has this kind"


def _run(*command: str | Path) -> bool:
    return subprocess.run([str(word) for word in command], check=False, cwd=ROOT).returncode == 0


def _missing(name: str, what: str) -> bool:
    print(f"{name}: skipped, it is not installed; {what} not checked")
    return True


def dockerfiles() -> bool:
    """Runs hadolint over every Dockerfile."""
    hadolint = tool("hadolint")
    if hadolint is None:
        return _missing("hadolint", "the Dockerfiles are")
    return _run(hadolint, "--no-color", *sorted(DEPLOY.glob("Dockerfile*")))


def compose() -> bool:
    """Has Compose read compose.yaml, which needs no daemon; version 1, another program, reads another form."""
    docker = tool("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        return _missing("docker compose", "compose.yaml is")
    return _run(docker, "compose", "-f", DEPLOY / "compose.yaml", "--profile", "monitoring", "config", "--quiet")


def prometheus() -> bool:
    """Runs promtool over the scrape configuration, the alerts, and when they fire."""
    promtool = tool("promtool")
    if promtool is None:
        return _missing("promtool", "alerts are")
    passed = _run(promtool, "check", "config", "--syntax-only", DEPLOY / "prometheus" / "prometheus.yml")
    passed &= _run(promtool, "check", "rules", ALERTS)
    return _run(promtool, "test", "rules", ALERT_TESTS) and passed


def chart() -> bool:
    """Helm's own look at the chart, with each set of values."""
    helm = tool("helm")
    if helm is None:
        return _missing("helm", "the chart is")
    command: list[str | Path] = [helm, "lint", CHART, "--strict", "--quiet", "--kube-version", f"{KUBERNETES[0]}.0"]
    return all(_run(*command, "--values", values) for values in values_files())


def objects() -> bool:
    """Every object against its schema: the manifests, and what the chart renders."""
    if importlib.util.find_spec("kubernetes_validate") is None:
        return _missing("kubernetes-validate", "manifests are")
    found = {str(path.relative_to(ROOT)): documents(path.read_text()) for path in MANIFESTS}
    if tool("helm"):
        try:
            found |= {f"chart with {values.name}": render(values) for values in values_files()}
        except subprocess.CalledProcessError as error:
            print(error.stderr)
            return False
    wrong = [f"{place}: {text}" for place, made in found.items() for text in complaints(made)]
    print("\n".join(wrong))
    return not wrong


def main() -> int:
    """Runs all checks.

    Returns:
        0 if they passed or were skipped, 1 if one failed.
    """
    checks = (dockerfiles, compose, prometheus, chart, objects)
    failed = [check.__name__ for check in checks if not check()]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
