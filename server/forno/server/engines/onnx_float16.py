"""Makes a float16 model of a float32 one, for engines that compute in the types that a model says.

ONNX Runtime's own converter does it, which comes with it. Inputs and outputs stay as they are. So does what squares,
exponentiates or sums, with what is done next to the result, because float16 ends at 65504 and begins at 6e-8: a layer
normalization that is written out squares, averages, adds a millionth and takes the root.

It takes five times the memory of the weights, and for whole seconds the interpreter's lock. A server has it done in a
process apart: `python -m forno.server.engines.onnx_float16 MODEL FOLDER SETTING`, which leaves the model in the folder,
or the file `failed`, which says why not.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server import apart, scratch
from forno.server.errors import ConfigError, NotReady

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

log = logging.getLogger("forno.engine.onnx")

CONVERTER = (sys.executable, "-m", "forno.server.engines.onnx_float16")
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
_FAILED = "failed"
_POLL_S = 0.2


@contextmanager
def converted(
    model: Path, setting: str, stopping: threading.Event | None = None, converter: Sequence[str] = CONVERTER
) -> Iterator[Callable[[], Path]]:
    """What converts a model when it is first called, in a process apart, and gives the file; it ends with the context.

    Args:
        model: The model; its data are found beside it.
        setting: What asks for it, such as `cuda.precision`, for messages.
        stopping: Ends the conversion once it is set.
        converter: The command that converts.

    Raises:
        ConfigError: By what is yielded: see `convert`, or it has crashed.
        NotReady: The same: it was stopped.
    """
    scratch.remove_stale()
    folder, lock = scratch.make()
    try:
        yield functools.cache(
            lambda: _converted(model, [*converter, str(model), str(folder), setting], folder, stopping)
        )
    finally:
        scratch.remove(folder, lock)


def _converted(model: Path, command: list[str], folder: Path, stopping: threading.Event | None) -> Path:
    began_s = time.monotonic()
    with tempfile.TemporaryFile() as words:
        process = apart.begin(command, words, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                if stopping is not None and stopping.is_set():
                    raise NotReady(f"{model}: converting it to float16 was given up, because nobody waits for it")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            apart.end(process)
        if (folder / _FAILED).is_file():
            raise ConfigError(f"{model}: {(folder / _FAILED).read_text(encoding='utf-8')}")
        if process.returncode:
            how = apart.ending(process.returncode, words)
            raise ConfigError(f"{model}: the process that converts it to float16 {how}")
    log.info("%s: converted to float16 in %.1f s", model, time.monotonic() - began_s)
    return folder / model.name


def convert(model: Path, folder: Path, setting: str) -> Path:
    """Writes the float16 model of a float32 one into a folder, its weights in a file beside it.

    Args:
        model: The model; its data are found beside it.
        folder: Where to; it has nothing of these names.
        setting: What asks for it, such as `cuda.precision`, for messages.

    Raises:
        ConfigError: It cannot be converted, has nothing to be converted, or what converts is not installed.
    """
    try:
        import onnx  # noqa: PLC0415  (only who converts needs it)
        from onnxruntime.transformers import float16  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"{setting} is 'fp16', and what converts the model is not installed ({error}): pip install 'forno[gpu]'"
        ) from error
    written = folder / model.name
    try:
        # Types are inferred before the data come, because no more than 2 GB can be inferred from.
        typed = onnx.shape_inference.infer_shapes(onnx.load(model, load_external_data=False))
        if not _has(typed.graph, onnx.TensorProto.FLOAT):
            raise ConfigError(f"{setting} is 'fp16', and the model has no float32 to be converted; remove the setting")
        onnx.load_external_data_for_model(typed, str(model.parent))
        exact = _exact(typed.graph)
        halved = float16.convert_float_to_float16(
            typed, keep_io_types=True, disable_shape_infer=True, node_block_list=exact
        )
        _make_once(halved.graph)
        _join(halved.graph, exact, onnx.TensorProto)
        onnx.save(halved, written, save_as_external_data=True, location=_WEIGHTS)
    except ConfigError:
        raise
    except Exception as error:  # of any kind: they are the converter's own
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{setting} is 'fp16', and the model cannot be converted to it: {told}; convert it yourself, "
            "such as with ModelOpt's AutoCast, and remove the setting"
        ) from error
    return written


def _has(graph: Any, data_type: int) -> bool:
    """Whether there are tensors of a type, here or in the graphs of nodes."""
    values = (*graph.input, *graph.output, *graph.value_info)
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    return (
        any(each.data_type == data_type for each in graph.initializer)
        or any(each.type.tensor_type.elem_type == data_type for each in values)
        or any(_has(each.g, data_type) for each in attributes if each.HasField("g"))
        or any(_has(each, data_type) for attribute in attributes for each in attribute.graphs)
    )


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


def main() -> None:
    """Converts, in a process of its own."""
    model, folder, setting = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    try:
        convert(model, folder, setting)
    except ConfigError as error:
        (folder / _FAILED).write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    main()
