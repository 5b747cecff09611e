"""Engines and slots: answers must be exactly plain ONNX Runtime's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto as Type
from tests.unit import onnx_models

from forno.server.config import ModelSettings, NullSettings, OnnxSettings
from forno.server.engines import engine_name, open_engine
from forno.server.engines.null import NullEngine
from forno.server.engines.onnx import OnnxEngine
from forno.server.errors import ConfigError
from forno.server.signature import Signature, TensorSpec
from forno.server.slots.host import BORROW_FROM_BYTES, HostSlot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.engines import Engine

    Array = np.ndarray[Any, np.dtype[Any]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def run(engine: Engine[Any], *requests: tuple[Array, ...], slot: Any = None, max_rows: int = 16) -> list[Array]:
    rows = sum(len(each[0]) for each in requests) if engine.signature.batched else 1
    slot = slot or engine.new_slot(max_rows if engine.signature.batched else 1)
    slot.load(list(requests), rows)
    outputs = [np.array(output) for output in engine.run(slot, rows)]
    slot.release()
    return outputs


def plain(path: Path, *arrays: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options)
    names = [spec.name for spec in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))  # type: ignore[no-any-return]


def assert_same(ours: Sequence[Array], theirs: Sequence[Array]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, strict=True)


def unaligned(array: Array) -> Array:
    """The same elements at an address that no runtime likes."""
    return np.frombuffer(b"?" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


def slot_of(shape: tuple[int, ...], dtype: str = "f4", *, batched: bool = True, max_rows: int = 8) -> HostSlot:
    return HostSlot(Signature((TensorSpec("x", np.dtype(dtype), shape),), (), batched), max_rows)


def test_rows_of_requests_meet_in_the_fixed_place():
    slot = slot_of((-1, 3))
    parts = [np.full((rows, 3), rows, np.float32) for rows in (1, 3, 2)]
    slot.load([(unaligned(part),) for part in parts], 6)
    np.testing.assert_array_equal(slot.inputs[0], np.concatenate(parts))
    assert slot.fixed
    assert np.shares_memory(slot.inputs[0], slot.places[0])


def test_rows_of_open_shape_meet_in_a_slab_that_grows():
    slot = slot_of((-1, -1))
    for width in (2, 9, 3):
        parts = [np.full((rows, width), rows, np.float32) for rows in (1, 2)]
        slot.load([(part,) for part in parts], 3)
        np.testing.assert_array_equal(slot.inputs[0], np.concatenate(parts))
    assert not slot.fixed
    assert slot._slabs[0].nbytes == 3 * 9 * 4


def test_a_large_lone_request_is_read_where_it_lies_if_a_runtime_may():
    width = BORROW_FROM_BYTES // 4
    slot = slot_of((-1, width))
    array = np.ones((1, width), np.float32)
    slot.load([(array,)], 1)
    assert slot.inputs[0] is array
    slot.load([(unaligned(array),)], 1)
    assert slot.inputs[0].flags.aligned
    np.testing.assert_array_equal(slot.inputs[0], array)
    slot.load([(np.ones((width, 2), np.float32).T[:1],)], 1)
    assert slot.inputs[0].flags.c_contiguous
    slot.release()
    assert not slot.inputs


def test_a_small_lone_request_is_copied():
    slot = slot_of((-1, 2))
    slot.load([(np.ones((1, 2), np.float32),)], 1)
    assert slot.fixed


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 2)])
def test_unbatched_inputs_keep_their_shape(shape):
    for declared in (shape, (-1,) * len(shape)):
        slot = slot_of(declared, batched=False, max_rows=1)
        array = np.ones(shape, np.float32)
        slot.load([(array,)], 1)
        assert slot.inputs[0].shape == shape


def test_strings_are_not_copied_into_places():
    slot = slot_of((-1, 1), "O")
    parts = [np.array([[word]], object) for word in ("a", "b")]
    slot.load([(part,) for part in parts], 2)
    assert slot.inputs[0].tolist() == [["a"], ["b"]]
    scalar = slot_of((), "O", batched=False, max_rows=1)
    scalar.load([(np.array("a", object),)], 1)
    assert scalar.inputs[0].shape == ()


def test_the_engine_is_found_from_the_file(tmp_path):
    assert engine_name(tmp_path / "m.onnx", ModelSettings()) == "onnx"
    assert engine_name(None, ModelSettings(engine="null")) == "null"
    with pytest.raises(ConfigError, match=r"no engine runs '.*m\.txt'; known are files ending in \.onnx"):
        engine_name(tmp_path / "m.txt", ModelSettings())
    with pytest.raises(ConfigError, match="needs the path"):
        open_engine(None, ModelSettings(engine="onnx"))


def test_the_null_engine_answers_its_input():
    engine = open_engine(None, ModelSettings(engine="null", null=NullSettings(shape=(-1, 2), data_type="int8")))
    assert engine.signature.batched
    x = np.array([[1, 2]], np.int8)
    assert_same(run(engine, (x,), (x,)), [np.concatenate([x, x])])
    engine.close()


def test_the_null_engine_of_a_fixed_shape_is_not_batched():
    assert not NullEngine(NullSettings(shape=(2, 2))).signature.batched
    assert not NullEngine(NullSettings(shape=())).signature.batched


def test_the_null_engine_names_the_types_that_it_could_have():
    with pytest.raises(ConfigError, match="'float33', expected one of bool, int8"):
        NullEngine(NullSettings(data_type="float33"))


def test_the_signature_is_the_files(tmp_path):
    engine = OnnxEngine(onnx_models.two_in_two_out(tmp_path / "m.onnx"), OnnxSettings())
    assert engine.signature == Signature(
        (
            TensorSpec("a", np.dtype("f4"), (-1, 4), ("n", "")),
            TensorSpec("b", np.dtype("f4"), (-1, 1), ("n", "")),
        ),
        (
            TensorSpec("sum", np.dtype("f4"), (-1, 4), ("n", "")),
            TensorSpec("product", np.dtype("f4"), (-1, 4), ("n", "")),
        ),
        batched=True,
    )


def test_inputs_that_count_different_things_are_no_rows(tmp_path):
    path = onnx_models.save(
        tmp_path / "m.onnx",
        [("a", Type.FLOAT, ["n", 4]), ("b", Type.FLOAT, ["m", 4])],
        [("y", Type.FLOAT, ["k", 4])],
        [onnx_models.helper.make_node("Concat", ["a", "b"], ["y"], axis=0)],
    )
    assert not OnnxEngine(path, OnnxSettings()).signature.batched


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_bound_runs_equal_plain_ones(tmp_path, rows):
    path = onnx_models.mlp(tmp_path / "m.onnx")
    engine = OnnxEngine(path, OnnxSettings())
    slot = engine.new_slot(8)
    random = np.random.default_rng(0)
    for _ in range(3):
        x = random.standard_normal((rows, 8)).astype(np.float32)
        assert_same(run(engine, *[(row[None],) for row in x], slot=slot), plain(path, x))
    assert engine._binds
    assert list(slot.bindings) == [rows]


def test_an_input_that_is_also_an_output_is_answered(tmp_path):
    path = onnx_models.passed_through(tmp_path / "m.onnx")
    engine = OnnxEngine(path, OnnxSettings())
    slot = engine.new_slot(8)
    for _ in range(2):
        x = np.ones((2, 4), np.float32)
        assert_same(run(engine, (x[:1],), (x[1:],), slot=slot), plain(path, x))
    assert engine._binds is False


def test_an_output_of_an_undeclared_shape_is_answered(tmp_path):
    engine = OnnxEngine(onnx_models.reshaped(tmp_path / "m.onnx"), OnnxSettings())
    slot = engine.new_slot(1)
    x = np.arange(4, dtype=np.float32)
    for shape in ((2, 2), (4, 1), (2, 2)):
        (y,) = run(engine, (x, np.array(shape)), slot=slot)
        np.testing.assert_array_equal(y, x.reshape(shape), strict=True)
    with pytest.raises(Exception, match="Reshape"):
        run(engine, (x, np.array([3, 3])), slot=slot)


@pytest.mark.parametrize(
    ("type_", "dtype"),
    [
        (Type.FLOAT, "f4"),
        (Type.DOUBLE, "f8"),
        (Type.FLOAT16, "f2"),
        (Type.BFLOAT16, BFLOAT16),
        (Type.BOOL, "?"),
        (Type.INT8, "i1"),
        (Type.INT64, "i8"),
        (Type.UINT8, "u1"),
        (Type.UINT64, "u8"),
        (Type.STRING, "O"),
    ],
)
@pytest.mark.parametrize("dims", [["n", 3], ["n", "m"], [2, 3], [], [0, 3]])
def test_every_type_and_kind_of_shape_is_carried(tmp_path, type_, dtype, dims):
    path = onnx_models.one(tmp_path / "m.onnx", "Identity", type_, dims)
    engine = OnnxEngine(path, OnnxSettings())
    shape = tuple(2 + index if isinstance(dim, str) else dim for index, dim in enumerate(dims))
    x = np.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(dtype)
    if dtype == "O":
        x = np.asarray(x.astype(str)).astype(object)
    slot = engine.new_slot(4 if engine.signature.batched else 1)
    for _ in range(2):
        assert_same(run(engine, (x,), slot=slot), [x])
        if engine.signature.batched:
            assert_same(run(engine, (x[:1],), (x[1:],), slot=slot), [x])


def test_large_requests_are_answered_from_where_they_lie(tmp_path):
    width = BORROW_FROM_BYTES // 2
    engine = OnnxEngine(onnx_models.one(tmp_path / "m.onnx", "Neg", Type.FLOAT, ["n", width]), OnnxSettings())
    x = np.arange(width, dtype=np.float32).reshape(1, width)
    assert_same(run(engine, (x,)), [-x])
    assert_same(run(engine, (unaligned(x),)), [-x])
    assert_same(run(engine, (x,), (x,)), [np.concatenate([-x, -x])])


def test_no_more_bindings_are_kept_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("forno.server.engines.onnx._MOST_BINDINGS", 3)
    engine = OnnxEngine(onnx_models.mlp(tmp_path / "m.onnx"), OnnxSettings())
    slot = engine.new_slot(16)
    for rows in range(1, 12):
        run(engine, (np.ones((rows, 8), np.float32),), slot=slot)
        assert len(slot.bindings) <= 3


def test_settling_changes_threads_and_not_answers(tmp_path):
    path = onnx_models.mlp(tmp_path / "m.onnx")
    engine = OnnxEngine(path, OnnxSettings())
    x = np.ones((2, 8), np.float32)
    before = run(engine, (x,))
    session = engine._session
    assert not engine.settle(small=True)
    assert engine._session is session
    engine._threads = 5
    assert engine.settle(small=True)
    assert engine._session is not session
    assert_same(run(engine, (x,)), before)
    assert OnnxEngine(path, OnnxSettings(intra_op_threads=3))._threads == 3
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"no model at all" * 99, "Protobuf parsing failed"), (b"", "No graph was found")],
    ids=["garbage", "empty"],
)
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"m\.onnx is not a readable ONNX model: {reason}") as caught:
        OnnxEngine(path, OnnxSettings())
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not a readable ONNX model: .*doesn't exist"):
        OnnxEngine(tmp_path / "none.onnx", OnnxSettings())


def test_a_type_that_is_not_carried_is_refused_by_name(tmp_path):
    path = onnx_models.of_sequence(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=r"its input 's' is a seq\(tensor\(float\)\), expected a tensor of bool"):
        OnnxEngine(path, OnnxSettings())
    path = onnx_models.one(tmp_path / "f8.onnx", "Identity", Type.FLOAT8E4M3FN, ["n"])
    with pytest.raises(ConfigError, match=r"tensor\(float8e4m3fn\)"):
        OnnxEngine(path, OnnxSettings())


def test_a_missing_runtime_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "forno.server.engines.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'forno\[server\]'"):
        open_engine(tmp_path / "m.onnx", ModelSettings())


LOADS_A_MODEL = """
import sys
from pathlib import Path
from forno.server.config import OnnxSettings
from forno.server.engines.onnx import OnnxEngine
OnnxEngine(Path(sys.argv[1]), OnnxSettings())
"""


def test_the_runtime_reports_to_nobody(tmp_path):
    # Where it reports, it keeps an identifier of the machine under the user's folder.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment.pop("XDG_CACHE_HOME", None)
    for variable in ("CI", "PYTEST_CURRENT_TEST"):  # with which it does not report in any case
        environment.pop(variable, None)
    model = Path(__file__).parents[2] / "examples/models/spam/1/model.onnx"
    subprocess.run([sys.executable, "-c", LOADS_A_MODEL, str(model)], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []
