"""A new version of a model gets a kept plan with its own weights, and never one that would answer by the old ones."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto as Type
from onnx import helper, numpy_helper
from tests.unit import onnx_models, plans
from tests.unit.test_engines import plain
from tests.unit.test_onnx_cuda import answers, normal
from tests.unit.test_tensorrt_build import Bench

from forno.kernels.devices import attached
from forno.server.config import ModelSettings
from forno.server.engines import open_engine, tensorrt
from forno.server.engines.tensorrt import library
from forno.server.engines.tensorrt.structure import structure_of
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REFIT = {"refit": True}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Bench]:
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setattr(tensorrt, "open_device", lambda name, ordinal: bench.device)
    with caplog.at_level(logging.INFO, "forno.engine.tensorrt"):
        yield bench
    plans.uninstalled()


def seen(path: Path, seed: int, *, most: float = 6.0, channels: int = 4, least: int = 0) -> Path:
    """Clip(BatchNormalization(Conv(x))) + shift, of random weights: [rows, 3, 4, 4] -> [rows, channels, 3, 3]."""
    path.parent.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    weights = {
        "w": random.standard_normal((channels, 3, 2, 2)),
        "b": random.standard_normal(channels),
        "scale": random.uniform(0.5, 2, channels),
        "shift": random.standard_normal(channels),
        "mean": random.standard_normal(channels),
        "variance": random.uniform(0.5, 2, channels),
        "least": np.float32(least),
        "most": np.float32(most),
        "offset": random.standard_normal(1),
    }
    return onnx_models.save(
        path,
        [("x", Type.FLOAT, ["rows", 3, 4, 4])],
        [("y", Type.FLOAT, ["rows", channels, 3, 3])],
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"]),
            helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["n"]),
            helper.make_node("Clip", ["n", "least", "most"], ["l"]),
            helper.make_node("Add", ["l", "offset"], ["y"]),
        ],
        {name: np.asarray(value, np.float32) for name, value in weights.items()},
    )


def changed(model: Path, to: Path, change: Callable[[Any], object]) -> Path:
    """A copy of a model with a change."""
    loaded = onnx.load(model)
    change(loaded)
    to.parent.mkdir(exist_ok=True)
    onnx.save(loaded, to)
    return to


def served(bench: Bench, model: Path) -> None:
    """The model is opened as a server does, and answers by its own weights."""
    settings = ModelSettings(engine="tensorrt", tensorrt={"cache_dir": bench.folder, **REFIT}, batching={"max_rows": 4})
    engine = open_engine(model, settings)
    x = normal(3, *[int(size) for size in engine.signature.inputs[0].shape[1:]])
    (got,) = answers(engine, engine.new_slot(4), (x,))
    np.testing.assert_allclose(got, plain(model, x)[0], rtol=1e-5, atol=1e-5)
    engine.close()


def test_the_next_version_takes_the_plan_with_its_own_weights(bench: Bench, tmp_path: Path, caplog: Any) -> None:
    served(bench, seen(tmp_path / "1" / "model.onnx", seed=1))
    bench.wish(fault="refuse")  # to build
    for seed in (2, 3):
        model = seen(tmp_path / str(seed) / f"model{seed}.onnx", seed=seed)
        said = str(bench.plans(model, tensorrt=REFIT, batching={"max_rows": 4}))
        assert "puts its weights, of which 7 differ, into" in said
        assert f"{bench.folder}/model-" in said
        served(bench, model)
        assert "given 7 weights" in caplog.text
        assert str(bench.plans(model, tensorrt=REFIT, batching={"max_rows": 4})).startswith("takes the plan kept as")
    assert bench.files() == {"model", "model2", "model3", "timings", "build", "structure"}


def test_without_the_setting_each_version_is_built(bench: Bench, tmp_path: Path) -> None:
    built = [bench.plans(seen(tmp_path / f"{seed}.onnx", seed=seed)).ready() for seed in (1, 2)]
    assert [bench.told(plan)["flags"] for plan in built] == [["TF32"]] * 2
    assert "structure" not in bench.files()
    said = str(bench.plans(seen(tmp_path / "1.onnx", seed=1), tensorrt=REFIT))  # those kept take no weights
    assert said.startswith("builds a plan, since none of its structure is kept, to be kept as")


@pytest.mark.parametrize("version", ["10.13.3.9", "10.16.1.11", "11.4.0.106"])
def test_plans_are_built_to_take_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    bench = Bench(tmp_path, monkeypatch, version)
    first = bench.plans(seen(tmp_path / "1.onnx", seed=1), tensorrt={**REFIT, "version_compatible": True}).ready()
    assert bench.told(first)["flags"] == ["REFIT", "TF32", "VERSION_COMPATIBLE"]
    second = bench.plans(seen(tmp_path / "2.onnx", seed=2), tensorrt={**REFIT, "version_compatible": True})
    bench.wish(fault="refuse")  # to build
    assert bench.told(second.ready()) == bench.told(first)
    plans.uninstalled()


def test_a_release_that_loses_biases_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, "11.3.0.99")
    with pytest.raises(ConfigError, match=r"tensorrt\.refit is set, and TensorRT 11\.3\.0\.99 is installed.* biases"):
        bench.plans(tensorrt=REFIT)
    bench.plans()
    plans.uninstalled()


def test_a_value_that_became_part_of_the_plan_has_it_built_anew(bench: Bench, tmp_path: Path, caplog: Any) -> None:
    served(bench, seen(tmp_path / "1.onnx", seed=1, most=6))
    served(bench, seen(tmp_path / "2.onnx", seed=2, most=1))
    assert "does not take all of the 8 weights that differ: 'most' became part of it when it was built" in caplog.text
    assert "; a plan is built" in caplog.text
    served(bench, seen(tmp_path / "3.onnx", seed=3, most=1))  # of the newer one
    assert caplog.text.count("given 7 weights") == 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"fault": "refit crash"}, r"was ended by SIGSEGV: Assertion `weights\.count == 3' failed"),
        ({"fault": "refit refuse"}, r"does not take its weights: In node 3 with name: and operator: Gemm \(refit\)"),
    ],
)
def test_weights_that_cannot_be_put_in_have_a_plan_built(
    bench: Bench, tmp_path: Path, caplog: Any, fault: dict[str, Any], told: str
) -> None:
    served(bench, seen(tmp_path / "1.onnx", seed=1))
    bench.wish(**fault)
    served(bench, seen(tmp_path / "2.onnx", seed=2))
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(told, warning), warning
    assert "\n" not in warning


def test_weights_that_no_model_has_are_named(bench: Bench, tmp_path: Path, caplog: Any) -> None:
    bench.wish(unnamed="(Unnamed Layer* 4) [Constant]")
    served(bench, seen(tmp_path / "1.onnx", seed=1))
    served(bench, seen(tmp_path / "2.onnx", seed=2))
    assert "does not take its weights: Only successfully refitted 5 weights out of 6; a plan is built" in caplog.text


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda plan: plan.write_bytes(plan.read_bytes()[:40]), "TensorRT cannot load"),
        (lambda plan: plan.unlink(), ""),
        (lambda plan: next(plan.parent.glob("structure-*")).write_text("{"), ""),
        (lambda plan: next(plan.parent.glob("structure-*")).write_text('{"plan": "x"}'), ""),
        (
            lambda plan: plan.write_bytes(plan.read_bytes().replace(b'"weights"', b'"weighty"')),
            "takes no weights: it was",
        ),
    ],
)
def test_a_kept_plan_that_is_harmed_has_another_built(
    bench: Bench, tmp_path: Path, caplog: Any, harm: Callable[[Path], object], told: str
) -> None:
    harm(bench.plans(seen(tmp_path / "1.onnx", seed=1), tensorrt=REFIT, batching={"max_rows": 4}).ready())
    served(bench, seen(tmp_path / "2.onnx", seed=2))
    assert (told in caplog.text) if told else not [each for each in caplog.records if each.levelname == "WARNING"]
    assert caplog.text.count(": built in") == 2


def replaced(name: str, value: Any) -> Callable[[Any], None]:
    """A change: another value for an initializer."""

    def change(model: Any) -> None:
        for each in model.graph.initializer:
            if each.name == name:
                each.CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    return change


def remark(model: Any) -> None:
    """A change of what only describes a model."""
    model.producer_name, model.producer_version, model.model_version, model.doc_string = "me", "7", 7, "of Monday"
    model.graph.name = model.graph.doc_string = model.graph.node[0].doc_string = "a text"
    helper.set_model_props(model, {"run": "17"})


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (remark, True),
        (replaced("table", np.ones((10, 4), np.float32)), True),
        (replaced("table", np.ones((11, 4), np.float32)), False),
        (replaced("table", np.ones((10, 4), np.float16)), False),
        (replaced("last", np.array([-1])), False),  # an axis is no weight
        (lambda model: setattr(model.graph.node[1].attribute[0], "i", Type.FLOAT16), False),
        (lambda model: setattr(model.graph.node[0], "name", "gathering"), False),  # what TensorRT calls a layer
        (lambda model: setattr(model.opset_import[0], "version", 20), False),
        (lambda model: model.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 5), False),
        (lambda model: model.graph.output.pop(), False),
    ],
)
def test_structure_is_all_but_weights_and_remarks(tmp_path: Path, change: Callable[[Any], object], same: bool) -> None:
    model = onnx_models.masked(tmp_path / "m.onnx")
    other = changed(model, tmp_path / "other.onnx", change)
    assert (structure_of(model).digest == structure_of(other).digest) is same
    assert structure_of(model).weights.keys() == structure_of(other).weights.keys() == {"table"}


def test_data_beside_a_model_are_weights_or_structure_alike(tmp_path: Path) -> None:
    def beside(name: str, change: Callable[[Any], object]) -> Any:
        path = changed(onnx_models.masked(tmp_path / "m.onnx"), tmp_path / name / "m.onnx", change)
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="data.bin", size_threshold=0)
        return structure_of(path)

    first = beside("first", remark)
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"m.onnx", "data.bin"}
    weights = beside("weights", replaced("table", np.ones((10, 4), np.float32)))
    axis = beside("axis", replaced("last", np.array([1])))
    assert first.digest == weights.digest != axis.digest
    assert first.weights != weights.weights
    assert first.weights == axis.weights
    (tmp_path / "first" / "data.bin").unlink()
    with pytest.raises(ConfigError, match=r"first/data\.bin cannot be read: No such file"):
        structure_of(tmp_path / "first" / "m.onnx")


def test_weights_of_graphs_within_nodes_are_structure(tmp_path: Path) -> None:
    def branched(name: str, value: float) -> Any:
        made = [
            helper.make_graph(
                [helper.make_node("Add", ["x", "k"], [each])],
                each,
                [],
                [helper.make_tensor_value_info(each, Type.FLOAT, ["n"])],
                [numpy_helper.from_array(np.full(1, value, np.float32), "k")],
            )
            for each in ("then", "else")
        ]
        node = helper.make_node("If", ["c"], ["y"], then_branch=made[0], else_branch=made[1])
        inputs = [("c", Type.BOOL, []), ("x", Type.FLOAT, ["n"])]
        return structure_of(onnx_models.save(tmp_path / name, inputs, [("y", Type.FLOAT, ["n"])], [node]))

    assert branched("1.onnx", 1).digest != branched("2.onnx", 2).digest
    assert branched("1.onnx", 1).weights == {}


@given(st.lists(st.floats(width=32), min_size=2, max_size=4), st.lists(st.floats(width=32), min_size=2, max_size=4))
def test_weights_are_told_apart_by_their_bytes(tmp_path_factory: Any, one: list[float], other: list[float]) -> None:
    def made(values: list[float]) -> Any:
        path = tmp_path_factory.getbasetemp() / "weights.onnx"
        add = [helper.make_node("Add", ["x", "w"], ["y"])]
        value = ("x", Type.FLOAT, ["n"])
        return structure_of(
            onnx_models.save(path, [value], [("y", *value[1:])], add, {"w": np.array(values, np.float32)})
        )

    first, second = made(one), made(other)
    equal = np.array(one, np.float32).tobytes() == np.array(other, np.float32).tobytes()
    assert (first.weights == second.weights) is equal
    assert (first.digest == second.digest) is (len(one) == len(other))


@given(content=st.binary(max_size=60))
def test_files_that_are_no_models_are_refused(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "structure.onnx"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        assert structure_of(path).weights == {}


def test_the_fake_refuses_what_the_real_one_does_not_survive(bench: Bench, tmp_path: Path) -> None:
    module = library.find().module
    built = bench.plans(seen(tmp_path / "1.onnx", seed=1), tensorrt=REFIT).ready()
    log = library.find().new_logger()
    with attached(bench.device):
        engine = module.Runtime(log).deserialize_cuda_engine(built.read_bytes())
        refitter = module.Refitter(engine, log)
        assert not module.OnnxParserRefitter(refitter, log).refit_from_file(str(bench.model))  # another one's weights
        module.OnnxParserRefitter(refitter, log).refit_from_file(str(tmp_path / "1.onnx"))
        with pytest.raises(module.Undefined, match="weights whose parser is gone"):
            refitter.refit_cuda_engine()
        engine.under_way = 1
        with pytest.raises(module.Undefined, match="work under way"):
            module.Refitter(engine, log).refit_cuda_engine()
        fixed = module.Runtime(log).deserialize_cuda_engine(bench.plans().ready().read_bytes())
        with pytest.raises(TypeError, match="returned nullptr"):
            module.Refitter(fixed, log)
    with pytest.raises(module.Undefined, match="without a current context"):
        module.Refitter(engine, log)
    told = json.loads(next(bench.folder.glob("structure-*")).read_text())
    assert told["plan"] == built.name
