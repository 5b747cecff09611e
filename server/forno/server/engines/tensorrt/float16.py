"""Makes a float16 model of a float32 one, for releases of TensorRT that take types from the model alone.

ONNX Runtime's own converter does it, which comes with it. Inputs and outputs stay as they are. So does what squares,
exponentiates or sums, with what is done next to the result, because float16 ends at 65504 and begins at 6e-8: a layer
normalization that is written out squares, averages, adds a millionth and takes the root.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_FAR = {
    "CumSum",
    "Exp",
    "Pow",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMean",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
}
"""Operators whose results are soon beyond float16."""
_BACK = {"Log", "Reciprocal", "Sqrt"}
"""Operators that bring those results back."""
_WEIGHTS = "weights.bin"


def convert(model: Path, folder: Path) -> Path:
    """Writes the float16 model of a float32 one into an empty folder, its weights in a file beside it.

    Raises:
        ConfigError: It cannot be converted, or what converts is not installed.
    """
    try:
        import onnx  # noqa: PLC0415  (only who converts needs it)
        from onnxruntime.transformers import float16  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"tensorrt.precision is 'fp16', and what converts the model is not installed ({error}): "
            "pip install 'forno[gpu,tensorrt]'"
        ) from error
    converted = folder / model.name
    try:
        # Types are inferred before the data come, because no more than 2 GB can be inferred from.
        typed = onnx.shape_inference.infer_shapes(onnx.load(model, load_external_data=False))
        onnx.load_external_data_for_model(typed, str(model.parent))
        exact = _exact(typed.graph)
        halved = float16.convert_float_to_float16(
            typed, keep_io_types=True, disable_shape_infer=True, node_block_list=exact
        )
        _make_once(halved.graph)
        _join(halved.graph, exact, onnx.TensorProto)
        onnx.save(halved, converted, save_as_external_data=True, location=_WEIGHTS)
    except Exception as error:  # of any kind: they are the converter's own
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"tensorrt.precision is 'fp16', and the model cannot be converted to it: {told}; convert it yourself, "
            "such as with ModelOpt's AutoCast, and remove the setting"
        ) from error
    return converted


def _exact(graph: Any) -> list[str]:
    """The names of nodes that stay float32; those that have none are given one."""
    far = {output for node in graph.node if node.op_type in _FAR for output in node.output}
    names = []
    for number, node in enumerate(graph.node):
        holds_graph = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        if node.op_type in _FAR | _BACK or (far & set(node.input) and not holds_graph):
            node.name = node.name or f"exact_{number}"
            names.append(node.name)
    return names


def _make_once(graph: Any) -> None:
    """Drops nodes that are there twice: before 1.32, ONNX Runtime casts anew for each node that takes the cast."""
    once = {tuple(node.output): node for node in graph.node}
    del graph.node[:]
    graph.node.extend(once.values())


def _join(graph: Any, exact: list[str], types: Any) -> None:
    """Lets what goes from an input or a float32 node to another go there as it is, not through float16."""
    made = {output for node in graph.node if node.name in exact for output in node.output}
    made |= {each.name for each in graph.input}
    casts = [(node, node.attribute[0].i) for node in graph.node if node.op_type == "Cast"]
    narrowed = {node.output[0]: node.input[0] for node, to in casts if to == types.FLOAT16 and node.input[0] in made}
    for node, to in casts:
        if to == types.FLOAT and node.input[0] in narrowed:
            node.input[0] = narrowed[node.input[0]]
