"""Small ONNX models for the end-to-end tests: one for each thing that can go wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def _save(folder: Path, version: str, nodes, inputs, outputs, constants=()) -> None:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*spec) for spec in inputs],
        [helper.make_tensor_value_info(*spec) for spec in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    (folder / version).mkdir(parents=True)
    onnx.save(model, folder / version / "model.onnx")


def make_repository(folder: Path) -> Path:
    """A repository of models:

    - add: y = a + b, rows of three floats; versions 1 and 2, where 2 adds ten more
    - fixed: y = 2x for one [2, 2] matrix, no batch axis
    - whole: y = x + 1, int64 rows of any length
    - words: y = x, strings
    - pick: y = table[x], ten entries; an index out of range fails in the engine; requests wait a little for each other
    - mean: y = x - mean(x over axis 0): a free first axis that does not count rows
    - slow: the null engine, 0.3 s a run
    - narrow: as slow, one row a run and one that may wait
    """
    row = ["n", 3]
    ten = np.array(10, np.float32)
    _save(
        folder / "add",
        "1",
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [("a", FLOAT, row), ("b", FLOAT, row)],
        [("y", FLOAT, row)],
    )
    _save(
        folder / "add",
        "2",
        [helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Add", ["s", "ten"], ["y"])],
        [("a", FLOAT, row), ("b", FLOAT, row)],
        [("y", FLOAT, row)],
        [("ten", ten)],
    )
    (folder / "add" / "model.yaml").write_text("versions: 2\nlabels: {old: '1'}\n")
    _save(
        folder / "fixed",
        "1",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [("x", FLOAT, [2, 2])],
        [("y", FLOAT, [2, 2])],
    )
    _save(
        folder / "whole",
        "1",
        [helper.make_node("Add", ["x", "one"], ["y"])],
        [("x", INT64, ["n", "k"])],
        [("y", INT64, ["n", "k"])],
        [("one", np.array(1, np.int64))],
    )
    _save(
        folder / "words",
        "1",
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", STRING, ["n"])],
        [("y", STRING, ["n"])],
    )
    _save(
        folder / "pick",
        "1",
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [("x", INT64, ["n"])],
        [("y", FLOAT, ["n"])],
        [("table", np.arange(10, dtype=np.float32))],
    )
    (folder / "pick" / "model.yaml").write_text("batching: {max_delay_us: 20000}\n")
    _save(
        folder / "mean",
        "1",
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ],
        [("x", FLOAT, ["n", 2])],
        [("y", FLOAT, ["n", 2])],
    )
    (folder / "slow").mkdir()
    (folder / "slow" / "model.yaml").write_text("engine: 'null'\nnull: {delay_us: 300000, shape: [-1, 2]}\n")
    (folder / "narrow").mkdir()
    (folder / "narrow" / "model.yaml").write_text(
        "engine: 'null'\nnull: {delay_us: 300000, shape: [-1, 2]}\nbatching: {max_rows: 1, max_pending_rows: 1}\n"
    )
    return folder
