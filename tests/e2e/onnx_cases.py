"""Every model of the `onnx` package's own backend tests, and what plain ONNX Runtime makes of it."""

from __future__ import annotations

import ctypes
import re
import warnings
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from onnx import TensorProto, load_model, numpy_helper
from onnx.backend.test import loader, runner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from onnx import ModelProto
    from onnx.backend.test.case.test_case import TestCase

    Array = np.ndarray[Any, np.dtype[Any]]

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "real")
BFLOAT16 = "tensor(bfloat16)"
CARRIED = frozenset(
    f"tensor({name})"
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float", "double", "string"),
    )
)
"""Element types that forno.v1 carries, as ONNX Runtime calls them."""


class Outcome(Enum):
    """What plain ONNX Runtime makes of a model on this machine."""

    PASSES = "passes"  # loads, runs, and answers what the test expects
    NOT_CARRIED = "not carried"  # loads, but has a type that forno.v1 does not carry
    NOT_LOADED = "not loaded"  # this runtime lacks the operator, the version or the type
    FAILS = "fails"  # loads, but does not run, or answers something else than the test expects, as random ones do


@dataclass(frozen=True)
class DataSet:
    """Inputs of one call, and what the test expects; None where the package holds no answer."""

    inputs: Mapping[str, Array]
    expected: Sequence[Array] | None


@dataclass
class Case:
    """One model of the backend tests."""

    name: str  # safe as a folder's and a model's name
    model: ModelProto
    test: TestCase
    outcome: Outcome = Outcome.NOT_LOADED
    why: str = ""
    data_sets: list[DataSet] = field(default_factory=list)
    answers: list[list[Array]] = field(default_factory=list)  # plain ONNX Runtime's, one entry a data set


def collect(step: int = 1) -> Iterator[Case]:
    """Every `step`-th model of each kind, judged by plain ONNX Runtime.

    The large architectures are few and left to the full run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases divide by zero and overflow on purpose
        for kind in KINDS:
            if kind == "real" and step > 1:
                continue
            for test in sorted(loader.load_model_tests(kind=kind), key=lambda test: test.name)[::step]:
                yield _judge(_read(test))


def session_of(model: bytes) -> Any:
    """A plain session: nothing set but one thread and silence."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_plain(session: Any, inputs: Mapping[str, Array]) -> list[Array]:
    """One run in process; bfloat16, which the runtime's Python interface leaves out, goes by its bits."""
    if all(spec.type != BFLOAT16 for spec in (*session.get_inputs(), *session.get_outputs())):
        return list(session.run(None, dict(inputs)))
    values = {name: _to_value(array) for name, array in inputs.items()}
    names = [spec.name for spec in session.get_outputs()]
    return [_from_value(value) for value in session.run_with_ort_values(names, values)]


def same(one: Array, other: Array) -> bool:
    """Whether two arrays are equal in type, shape and every element, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype.kind in "OSU":
        return bool((one == other).all())
    equal = one == other
    return bool((equal | ((one != one) & (other != other))).all())  # noqa: PLR0124  (only NaN differs from itself)


def _read(test: TestCase) -> Case:
    if test.model is not None:
        model = test.model
    elif test.url is not None:
        model = load_model(Path(loader.DATA_DIR) / "light" / Path(test.url).name)
    else:
        model = load_model(Path(str(test.model_dir)) / "model.onnx")
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{test.kind}_{test.name.removeprefix('test_')}")
    return Case(name, model, test)


def _judge(case: Case) -> Case:
    """Fills in what plain ONNX Runtime makes of the model."""
    try:
        session = session_of(case.model.SerializeToString())
    except Exception as error:  # noqa: BLE001  (the runtime's errors have no common base)
        case.why = _first_line(error)
        return case
    types = {spec.type for spec in (*session.get_inputs(), *session.get_outputs())}
    if types - CARRIED:
        case.outcome, case.why = Outcome.NOT_CARRIED, ", ".join(sorted(types - CARRIED))
        return case
    try:
        case.data_sets = _data_sets(case.test, case.model, [spec.name for spec in session.get_inputs()])
        case.answers = [run_plain(session, data_set.inputs) for data_set in case.data_sets]
    except Exception as error:  # noqa: BLE001  (as above)
        case.outcome, case.why = Outcome.FAILS, _first_line(error)
        return case
    case.why = _difference(case)
    case.outcome = Outcome.FAILS if case.why else Outcome.PASSES
    return case


def _difference(case: Case) -> str:
    """How plain answers differ from what the test expects; empty where they do not."""
    for data_set, answers in zip(case.data_sets, case.answers, strict=True):
        if data_set.expected is None:
            continue
        try:
            runner.Runner.assert_similar_outputs(
                list(data_set.expected), answers, case.test.rtol, case.test.atol, case.test.model_dir
            )
        except AssertionError as error:
            return _first_line(error)
    return ""


def _data_sets(test: TestCase, model: ModelProto, names: Sequence[str]) -> list[DataSet]:
    if test.url is not None:
        return [_dummy_data(test, model)]
    if test.data_sets is not None:
        return [
            DataSet(
                dict(zip(names, [_to_array(value) for value in inputs], strict=False)),
                [_to_array(value) for value in outputs],
            )
            for inputs, outputs in test.data_sets
        ]
    found = []
    for folder in sorted(Path(str(test.model_dir)).glob("test_data_set*")):
        inputs = [_load_tensor(path) for path in _numbered(folder, "input")]
        outputs = [_load_tensor(path) for path in _numbered(folder, "output")]
        found.append(DataSet(dict(zip([one.name for one in model.graph.input], inputs, strict=False)), outputs))
    return found


def _dummy_data(test: TestCase, model: ModelProto) -> DataSet:
    """The input that the package's own runner makes for an architecture, and the answer that it keeps."""
    weights = {weight.name for weight in model.graph.initializer}
    inputs = {
        one.name: runner.Runner.generate_dummy_data(one, seed=0, name=test.name)
        for one in model.graph.input
        if one.name not in weights
    }
    stem = Path(loader.DATA_DIR) / "light" / Path(str(test.url)).stem
    answers = [Path(f"{stem}_output_{index}.pb") for index in range(len(model.graph.output))]
    if not all(path.exists() for path in answers):
        return DataSet(inputs, None)
    return DataSet(inputs, [_load_tensor(path) for path in answers])


def _numbered(folder: Path, what: str) -> list[Path]:
    return sorted(folder.glob(f"{what}_*.pb"), key=lambda path: int(path.stem.rpartition("_")[2]))


def _load_tensor(path: Path) -> Array:
    return _to_array(TensorProto.FromString(path.read_bytes()))


def _to_array(value: Any) -> Array:
    array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
    if array.dtype.kind in "SU":
        array = array.astype(object)
    if array.dtype.kind == "O":
        decoded = [item.decode() if isinstance(item, bytes) else item for item in array.ravel()]
        flat = np.empty(len(decoded), object)
        flat[:] = decoded
        return flat.reshape(array.shape)
    return np.ascontiguousarray(array).reshape(array.shape)


def _to_value(array: Array) -> Any:
    if array.dtype.name == "bfloat16":
        bits = array.view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _from_value(value: Any) -> Array:
    if value.data_type() != BFLOAT16:
        return np.asarray(value.numpy())
    import ml_dtypes

    shape = tuple(value.shape())
    data = ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape)))
    return np.frombuffer(data, ml_dtypes.bfloat16).reshape(shape)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"
