"""The command line: which command runs, what it prints, how it ends."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forno.client._command import _plain
from forno.server.__main__ import COMMANDS, main
from forno.server.cli import arguments as common
from forno.server.errors import ConfigError

ROOT = Path(__file__).parents[2]
HEAVY = ("grpc", "numpy", "onnxruntime", "opentelemetry", "google", "orjson", "forno.v1", "forno.client")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FORNO_")]:
        monkeypatch.delenv(name)


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["help", command])
    assert caught.value.code == 0
    assert f"usage: forno {command}" in capsys.readouterr().out


def test_help_settings_tells_them_all(capsys):
    assert main(["help", "settings"]) == 0
    out = capsys.readouterr().out
    assert "  server.drain_s = 10.0\n      takes a number from 0 to 3600\n" in out
    assert "models.NAME.batching.max_delay_us" in out


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("forno ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sreve"], "forno: 'sreve' is not a command; did you mean `serve`?\n"),
        (["zebra"], "forno: 'zebra' is not a command; there are serve, fleet, check, keys, predict, health and help\n"),
        (
            ["a.txt", "--address", "x"],
            "forno: a.txt is a path, expected a command; to serve it: forno serve a.txt --address x\n",
        ),
        (
            ["serve"],
            (
                "forno: nothing to serve; expected a PATH to MODEL.onnx, NAME/model.onnx or "
                "NAME/VERSION/model.onnx, to a folder of such, or to a forno.yaml\n"
            ),
        ),
        (["serve", "none.onnx"], "forno: none.onnx: no such file or folder\n"),
        (["serve", "a.yaml", "b.yml"], "forno: a.yaml and b.yml are both settings files; expected one\n"),
        (
            ["serve", "a.yaml", "--config", "a.yaml"],
            "forno: a.yaml and a.yaml are both settings files; expected one\n",
        ),
        (["serve", "none.yaml"], "forno: none.yaml: cannot be read: No such file or directory\n"),
        (
            ["serve", "--address", "x"],
            (
                "forno: --address: server.address is 'x'; expected HOST:PORT with a port from 0 "
                "to 65535, such as 127.0.0.1:8080, 0.0.0.0:80 or [::1]:8080, or unix:PATH\n"
            ),
        ),
        (
            ["serve", "--transport", "evoy"],
            "forno: --transport: server.transport is 'evoy'; expected envoy, proxy or grpc\n",
        ),
        (
            ["serve", "--log-level", "all"],
            "forno: --log-level: server.log_level is 'all'; expected debug, info, warning or error\n",
        ),
        (
            ["serve", "--set", "server.drains=1"],
            "forno: --set server.drains: server.drains is not a setting; did you mean `drain_s`?\n",
        ),
        (
            ["check", "a.txt"],
            (
                "forno: a.txt: not a kind of file that is served; expected .onnx, .ort, .plan or .engine, a folder, "
                "or a settings file (.yaml)\n"
            ),
        ),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words, expected, capsys):
    Path("a.txt").touch()
    assert main(words) == 2
    assert capsys.readouterr() == ("", expected)


def test_each_fault_has_a_line(capsys):
    Path("forno.yaml").write_text("sever: {}\nserver: {drain_s: x}")
    assert main(["serve", "forno.yaml"]) == 2
    assert [line[:16] for line in capsys.readouterr().err.splitlines()] == ["forno: forno.yam"] * 2


def test_debug_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("FORNO_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["serve", "none.onnx"])


def test_flags_win_over_the_environment_and_the_file(monkeypatch):
    Path("forno.yaml").write_text("server: {address: a:1, transport: proxy, drain_s: 1}")
    monkeypatch.setenv("FORNO_SERVER__ADDRESS", "b:2")
    monkeypatch.setenv("FORNO_SERVER__DRAIN_S", "2")
    parsed = _parsed(["m.onnx", "forno.yaml"], address="c:3", sets=["server.drain_s=3"])
    config, paths = common.resolve(parsed, ("server.address", "server.transport"))
    assert (config.server.address, config.server.transport, config.server.drain_s) == ("c:3", "proxy", 3.0)
    assert paths == [Path("m.onnx")]


def _parsed(paths, address=None, sets=()):
    return argparse.Namespace(paths=paths, config=None, sets=sets, address=address, transport=None)


def test_a_missing_dependency_is_told_with_its_remedy():
    out = python(
        "import sys; sys.modules['pydantic'] = None; sys.stderr = sys.stdout\n"
        "from forno.server.__main__ import main; main(['serve', 'x.onnx'])"
    )
    assert out == "forno: pydantic is not installed; install it with: pip install 'forno[server]'\n"


def test_serve_is_light_until_it_serves():
    """The command decides what to serve, or that it cannot, before it imports anything heavy."""
    Path("spam").mkdir()
    Path("spam/model.onnx").touch()
    loaded = python(
        "import sys, forno.server.launch\n"
        "from forno.server.__main__ import main\n"
        "forno.server.launch.serve = lambda *_: print(*sys.modules) or 0\n"
        "main(['serve', 'spam'])"
    ).split()
    assert "forno.server.plain" in loaded
    assert not [name for name in loaded if name in (*HEAVY, "pydantic", "yaml")]


def test_predict_runs_without_the_dependencies_of_the_server():
    out = python(
        "import sys; sys.stderr = sys.stdout\n"
        "for name in ('pydantic', 'yaml', 'onnxruntime', 'orjson'): sys.modules[name] = None\n"
        "from forno.server.__main__ import main\n"
        "main(['predict', '--address', '127.0.0.1:1', 'spam', 'text=x'])"
    )
    assert out.startswith("forno: no server answers at 127.0.0.1:1")


def test_check_says_how_each_model_would_be_served(capsys):
    Path("forno.yaml").write_text(
        "models:\n  echo: {engine: null, 'null': {shape: [-1, 4]}}\n"
        "  one: {engine: null, batching: {enabled: false}}\n"
        "endpoints: {echoes: {model: echo}}"
    )
    assert main(["check", "forno.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "VERSION", "ENGINE", "BATCHING", "RUNS", "ONE", "ROW"]
    assert lines[1].startswith("echo   1        null    batches up to 32 rows")
    assert lines[1].endswith(" ms")
    assert lines[2:4] == ["    in   x: float32[?, 4]", "    out  y: float32[?, 4]"]
    assert "one request at a time" in lines[4]
    assert lines[-1] == "endpoint echoes -> echo"


def test_check_goes_on_after_a_failure_and_ends_with_1(capsys):
    Path("broken.onnx").write_text("not a model")
    Path("forno.yaml").write_text(
        "models: {broken: {path: broken.onnx}, echo: {engine: null}}\n"
        "endpoints: {a: {model: broken}, b: {model: echo, input: {codec: txt}}}"
    )
    assert main(["check", "forno.yaml"]) == 1
    out, err = capsys.readouterr()
    assert "echo " in out
    faults = err.splitlines()
    assert faults[0].startswith("forno: broken 1: ")
    assert faults[1].startswith("forno: endpoint b: ")
    assert len(faults) == 2


@pytest.mark.skipif(not (ROOT / "examples/models/digits").is_dir(), reason="the demo models have not been made")
def test_check_loads_the_demo_models(capsys):
    assert main(["check", str(ROOT / "examples/models")]) == 0
    assert "pixels: float32[?, 8, 8]" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error():
    sh = shutil.which("sh")
    if sh is None:
        pytest.skip("no shell here")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sh, "-c", f"{sys.executable} -m forno.server help settings | head -1"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_json_is_what_predict_prints():
    assert (
        json.dumps(_plain([b"\xff", float("inf"), -float("inf"), 1])) == '[{"b64": "/w=="}, "Infinity", "-Infinity", 1]'
    )
