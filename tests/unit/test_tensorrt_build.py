"""Plans are built apart, kept by all that they depend on, and nothing that goes wrong there harms what waits here."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.e2e.forno_server import ROOTS
from tests.unit import onnx_models, plans
from tests.unit.test_engines import plain
from tests.unit.test_onnx_cuda import answers, normal

from forno.server.config import ModelSettings
from forno.server.engines import open_engine, tensorrt
from forno.server.engines.onnx_files import files_of
from forno.server.engines.tensorrt import builder, library
from forno.server.engines.tensorrt.build import Plans
from forno.server.errors import ConfigError, NotReady

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 20


class Bench:
    """One cache, one GPU that is the CPU in the process that builds, and one model."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "11.4.0.106") -> None:
        self.folder = folder / "cache"
        self.model = onnx_models.mlp(folder / "m.onnx")
        self.device = plans.StrictDevice()
        self.device.name = "cpu"
        self._patch = monkeypatch
        plans.installed(monkeypatch, self.device, version)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(plans.FAKE), *ROOTS]))
        monkeypatch.setenv("FAKE_TENSORRT_LOADS", "1")  # in the process that builds

    def wish(self, **wishes: Any) -> None:
        self._patch.setenv("FAKE_TENSORRT_BUILD", json.dumps(wishes))

    def plans(self, model: Path | None = None, stopping: Any = None, **settings: Any) -> Plans:
        given = {"cache_dir": self.folder, **settings.pop("tensorrt", {})}
        whole = ModelSettings(engine="tensorrt", tensorrt=given, **settings)
        return Plans(model or self.model, whole, library.find(), self.device, stopping)

    def told(self, plan: Path) -> dict[str, Any]:
        """What the fake has written down of the build."""
        told: dict[str, Any] = json.loads(plan.read_bytes()[28:].split(b"\n")[0])
        return told

    def files(self) -> set[str]:
        return {path.name.partition("-")[0] for path in self.folder.iterdir()}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    yield Bench(tmp_path, monkeypatch)
    plans.uninstalled()


def test_a_plan_is_built_once_and_answers(bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(tensorrt, "open_device", lambda name, ordinal: bench.device)
    settings = ModelSettings(engine="tensorrt", tensorrt={"cache_dir": bench.folder}, batching={"max_rows": 12})
    written = set()
    for _ in range(2):
        engine = open_engine(bench.model, settings)
        (got,) = answers(engine, engine.new_slot(8), (normal(5, 8),))
        np.testing.assert_allclose(got, plain(bench.model, normal(5, 8))[0], rtol=1e-5, atol=1e-5)
        assert engine.profiles.rows == tuple(range(1, 13))
        engine.close()
        (plan,) = bench.folder.glob("*.plan")
        written.add(plan.stat().st_mtime_ns)
    assert len(written) == 1
    assert bench.files() == {"m", "timings", "build"}
    assert not any(bench.device.statistics().values())


def test_settings_reach_the_builder(bench: Bench) -> None:
    profiles = [
        {"x": {"min": [1, 8], "opt": [4, 8], "max": [6, 8]}},
        {"x": {"min": [8, 8], "opt": [8, 8], "max": [8, 8]}},
    ]
    built = bench.told(bench.plans().ready())
    assert (built["profiles"], built["flags"], built["typed"]) == ([{"x": [[1, 8], [32, 8], [32, 8]]}], ["TF32"], True)
    built = bench.told(
        bench.plans(
            tensorrt={
                "profiles": profiles,
                "workspace_bytes": 1 << 20,
                "optimization_level": 5,
                "version_compatible": True,
            },
            cuda={"tf32": False},
        ).ready()
    )
    assert built["profiles"] == [{"x": [[1, 8], [4, 8], [6, 8]]}, {"x": [[8, 8], [8, 8], [8, 8]]}]
    assert (built["flags"], built["settings"]) == (["VERSION_COMPATIBLE"], {"level": 5, "WORKSPACE": 1 << 20})
    (timings,) = bench.folder.glob("timings-*")
    assert json.loads(timings.read_bytes()) == {"x 3": 1, "x 5": 1}  # of both builds


def test_the_name_of_a_plan_says_all_that_it_depends_on(bench: Bench, tmp_path: Path) -> None:
    copy = tmp_path / "other" / "copy" / "m.onnx"
    copy.parent.mkdir(parents=True)
    other = onnx_models.one(tmp_path / "other" / "m.onnx", "Relu", 1, ["n"])
    copy.write_bytes(bench.model.read_bytes())
    first = bench.plans().path
    assert bench.plans(copy).path == first  # where it lies is of no matter
    profile = {"x": {"min": [1, 8], "opt": [4, 8], "max": [32, 8]}}
    names = {
        first,
        bench.plans(other).path,
        bench.plans(batching={"max_rows": 31}).path,
        bench.plans(padding={"allowed_rows": [1, 8]}).path,
        bench.plans(cuda={"tf32": False}).path,
        *[
            bench.plans(tensorrt=each).path
            for each in (
                {"profiles": [profile]},
                {"workspace_bytes": 1},
                {"optimization_level": 4},
                {"version_compatible": True},
                {"precision": "fp16"},
            )
        ],
    }
    assert len(names) == 10
    assert bench.plans(tensorrt={"build_limit_s": 5}, instances=3).path == first  # what a plan does not depend on
    assert bench.plans(tensorrt={"profiles": [profile]}, batching={"max_rows": 4}).path in names
    for name, value in (("architecture", "sm_80"), ("description", "Fake H200, 78 multiprocessors, driver 13")):
        was = getattr(bench.device, name)
        setattr(bench.device, name, value)
        names.add(bench.plans().path)
        setattr(bench.device, name, was)
    assert len(names) == 12


def test_another_release_builds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {
        Bench(tmp_path, monkeypatch, version).plans().path.name for version in ("11.4.0.106", "10.16.1.11", "11.4.1.2")
    }
    plans.uninstalled()
    assert len(paths) == 3


def test_types_of_tensorrt_10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, "10.16.1.11")
    built = bench.told(bench.plans(tensorrt={"precision": "fp16"}).ready())
    assert (built["flags"], built["typed"]) == (["FP16", "TF32"], False)
    assert bench.told(bench.plans().ready())["typed"]
    bench = Bench(tmp_path, monkeypatch, "11.4.0.106")
    with pytest.raises(
        ConfigError,
        match=r"precision is 'bf16', but TensorRT 11\.4\.0\.106 takes types from the model alone, and Forno",
    ):
        bench.plans(tensorrt={"precision": "bf16"})
    plans.uninstalled()


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (
            "crash",
            r"m\.onnx: the process that builds its plan was ended by SIGSEGV: Assertion `tactics\.size\(\) > 0' failed",
        ),
        ("exit", r"the process that builds its plan ended with status 3$"),
        (
            "refuse",
            r"m\.onnx: TensorRT cannot build it: Error Code 10: Could not find any implementation for node MatMul_1",
        ),
    ],
)
def test_a_build_that_fails_is_one_line_and_leaves_nothing(bench: Bench, fault: str, complaint: str) -> None:
    bench.wish(fault=fault)
    with pytest.raises(ConfigError, match=complaint) as caught:
        bench.plans().ready()
    assert "\n" not in str(caught.value)
    assert bench.files() == {"build"}
    bench.wish()
    assert bench.plans().ready().is_file()  # the next one is not disturbed


def test_a_build_that_takes_too_long_is_killed(bench: Bench) -> None:
    bench.wish(step_s=30)
    began_s = time.monotonic()
    with pytest.raises(ConfigError, match=r"took longer than tensorrt\.build_limit_s = 1, and was ended"):
        bench.plans(tensorrt={"build_limit_s": 1}).ready()
    assert time.monotonic() - began_s < 15
    assert bench.files() == {"build"}


def test_a_build_that_nobody_waits_for_is_killed(bench: Bench) -> None:
    bench.wish(step_s=30)
    stopping = threading.Event()
    threading.Timer(0.5, stopping.set).start()
    began_s = time.monotonic()
    with pytest.raises(NotReady, match="was given up, because the server ends"):
        bench.plans(stopping=stopping).ready()
    assert time.monotonic() - began_s < 15


def test_waiting_for_another_build_ends_with_the_server(bench: Bench) -> None:
    stopping = threading.Event()
    stopping.set()
    with bench.plans()._cache.turn(pytest.fail), pytest.raises(NotReady, match="because the server ends"):
        bench.plans(stopping=stopping).ready()


def test_processes_take_turns_and_build_once(bench: Bench, caplog: Any) -> None:
    bench.wish(step_s=0.1)
    results: list[Path] = []
    stamps: set[int] = set()

    def ready() -> None:
        results.append(bench.plans().ready())
        stamps.add(results[-1].stat().st_mtime_ns)

    threads = [threading.Thread(target=ready) for _ in range(3)]
    with caplog.at_level("INFO", "forno.engine.tensorrt"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert len(results) == 3
    assert len(stamps) == 1
    assert sum("waits for another process" in record.message for record in caplog.records) == 2


def test_plans_that_were_not_used_for_long_make_room(bench: Bench, tmp_path: Path, caplog: Any) -> None:
    models = [
        onnx_models.one(tmp_path / f"{name}.onnx", name, 1, ["n", 4]) for name in ("Relu", "Tanh", "Sqrt", "Ceil")
    ]
    kept = [bench.plans(model).ready() for model in models[:3]]
    for plan in kept:  # used in the order in which they were made, and the first once more
        bench.plans(models[kept.index(plan)]).ready()
    bench.plans(models[0]).ready()
    limit_bytes = sum(plan.stat().st_size for plan in kept)
    with caplog.at_level("INFO", "forno.engine.tensorrt"):
        kept.append(bench.plans(models[3], tensorrt={"cache_limit_bytes": limit_bytes}).ready())
    assert [plan.is_file() for plan in kept] == [True, False, True, True]
    assert f"{kept[1]} is removed: plans may have tensorrt.cache_limit_bytes = {limit_bytes}" in caplog.text
    bench.plans(models[1], tensorrt={"cache_limit_bytes": 1}).ready()
    assert [plan.is_file() for plan in kept] == [False, True, False, False]  # the new one stays in any case


def test_a_kept_plan_that_is_damaged_is_built_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "open_device", lambda name, ordinal: bench.device)
    settings = ModelSettings(engine="tensorrt", tensorrt={"cache_dir": bench.folder})
    plan = bench.plans().ready()
    whole = plan.read_bytes()
    plan.write_bytes(whole[:40])
    open_engine(bench.model, settings).close()
    assert plan.read_bytes() == whole


def test_a_runtime_that_builds_nothing_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.find()
    monkeypatch.delattr(found.module, "Builder")
    monkeypatch.setattr(library, "find", lambda: library.Library(found.module, "tensorrt_lean", found.version))
    with pytest.raises(
        ConfigError, match=r"m\.onnx needs a plan, and tensorrt_lean builds none; install all of TensorRT"
    ):
        bench.plans().ready()


@pytest.mark.parametrize(
    ("model", "profiles", "complaint"),
    [
        (
            "open",
            [],
            r"must say what shapes a plan is built for: of input 'x' of \[-1, -1\] more is open than the rows",
        ),
        ("reshaped", [], r"of input '\w+', which says a shape more is open"),
        ("open", [{"y": {"min": [1], "opt": [1], "max": [1]}}], "has 'y', which is no input; the model has x"),
        ("open", [{}], r"has no shapes for input 'x' of \[-1, -1\]"),
        (
            "mlp",
            [{"x": {"min": [1, 8], "opt": [1, 8], "max": [1, 9]}}],
            r"has max \[1, 9\] for input 'x', which is \[-1, 8\]",
        ),
        ("mlp", [{"x": {"min": [1], "opt": [1], "max": [1]}}], r"has min \[1\] for input 'x', which is \[-1, 8\]"),
        ("broken", [], "m.onnx is not a readable ONNX model|TensorRT cannot read it: Failed to parse the model"),
    ],
)
def test_profiles_that_do_not_fit_the_model(
    bench: Bench, tmp_path: Path, model: str, profiles: Any, complaint: str
) -> None:
    match model:
        case "open":
            path = onnx_models.one(tmp_path / "o.onnx", "Relu", 1, ["n", "length"])
        case "reshaped":
            path = onnx_models.reshaped(tmp_path / "o.onnx")
        case "broken":
            path = tmp_path / "m.onnx"
            path.write_bytes(b"no model")
        case _:
            path = bench.model
    with pytest.raises(ConfigError, match=complaint):
        bench.plans(path, tensorrt={"profiles": profiles}).ready()


def test_models_with_data_beside_them_are_known_by_those_too(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "external" / "m.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(bench.model), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert files_of(path) == [path, path.parent / "weights.bin"]
    assert files_of(bench.model) == [bench.model]
    before = bench.plans(path).path
    content = bytearray((path.parent / "weights.bin").read_bytes())
    content[0] ^= 1
    (path.parent / "weights.bin").write_bytes(content)
    assert bench.plans(path).path != before
    (path.parent / "weights.bin").unlink()
    with pytest.raises(ConfigError, match=r"has data in .*weights\.bin, which is not there"):
        files_of(path)


@given(content=st.binary(max_size=60))
def test_files_that_are_no_models_are_refused_or_have_no_others(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.onnx"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        assert files_of(path)[0] == path


def test_progress_never_goes_back() -> None:
    told: list[dict[str, Any]] = []
    progress = builder.Progress(told.append, iter(range(100)).__next__)
    progress.start("build", None, 2)
    progress.step("build", 0)
    progress.start("tactics", "build", 4)
    for step in range(4):
        progress.step("tactics", step)
    progress.start("more tactics", "build", 2)
    progress.step("more tactics", 0)
    progress.finish("more tactics")
    progress.finish("tactics")
    progress.step("build", 1)
    progress.finish("build")
    done = [each["progress"]["done"] for each in told]
    assert done == sorted(done)
    assert (done[1], done[3], done[-1]) == (0.5, 0.625, 1.0)
