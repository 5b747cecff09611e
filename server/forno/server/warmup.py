"""The first runs of a model: proves that it works, whether rows are independent, and how long a run takes.

A signature can only suggest that axis 0 counts rows. So three rows are run alone and together, and must come out the
same; a softmax or a mean over axis 0, a recurrent net or a random number shows itself here, not in a caller's answer.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.errors import ConfigError
from forno.v1.tensors import OBJECT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forno.server.config import BatchingSettings
    from forno.server.engines import Engine
    from forno.server.signature import Signature, TensorSpec

    Array = np.ndarray[Any, np.dtype[Any]]
    Arrays = tuple[Array, ...]

log = logging.getLogger("forno.model")

_FILLS = ("random", "ones", "zeros")
_FREE_SIZES = (1, 8, 32, 64, 224)
_MOST_ELEMENTS = 1 << 22
_WORDS = ("bread", "oven", "flour", "salt", "1", "0")
_PROOF_ROWS = 3
_TIMED_RUNS = 5
_TIMED_US = 50_000  # what takes so long is far from the event loop anyway


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What the first runs have shown."""

    signature: Signature  # with `batched` decided
    run_us: int  # one run of `max_rows` rows, or of one row where that alone is too long to run on the event loop
    inline: bool  # whether runs are short enough for the event loop
    passed: bool  # whether a run has passed at all
    note: str  # what a person should know: why rows run alone, or that no run has passed; may be empty


def warm_up(engine: Engine[Any], batching: BatchingSettings, inline_below_us: int) -> WarmUp:
    """Runs made-up inputs through a freshly opened engine and leaves it ready to make its slots. Blocks; any thread.

    Inputs are random at first, then ones, then zeros, with growing sizes for open dimensions, until a run passes. If
    none passes, the model may still be fine: nothing made up fits what it wants, such as indexes into its own tables.
    It is then served unbatched, and the note says that no run has passed.

    Raises:
        ConfigError: The settings say that rows are independent, and they are not.
    """
    declared = engine.signature
    wanted = batching.enabled
    if wanted:
        _check_rows_are_free(declared)
    engine.signature = replace(declared, batched=declared.batched if wanted is None else wanted)
    inputs, note = _prove_rows(engine) if engine.signature.batched else (None, "")
    if note and wanted:
        if inputs is not None:
            raise ConfigError(f"batching.enabled is true, but {note}")
        note += "; its rows run together because batching.enabled is true"
    elif note:
        inputs = None
        engine.signature = replace(declared, batched=False)
    if not engine.signature.batched:
        inputs = _first_passing(engine)
        if inputs is None:
            note = "no inference has passed: no made-up input fits this model; it is served unbatched, as it is"
    if inputs is None:
        return WarmUp(engine.signature, inline_below_us, inline=False, passed=False, note=note)
    return _measure(engine, inputs, batching.max_rows, inline_below_us, note)


def _prove_rows(engine: Engine[Any]) -> tuple[Arrays | None, str]:
    """Inputs of one row that passed, and why rows are not taken as independent; empty where they are."""
    signature = engine.signature
    for fill, inputs in _made_up(signature, _PROOF_ROWS):
        first, rest = tuple([array[:1] for array in inputs]), tuple([array[1:] for array in inputs])
        alone = _try_run(engine, first, 1)
        if alone is None:
            continue
        if fill != "random":
            return None, "no inputs of different rows could be made up to prove that its rows are independent"
        others, together = _try_run(engine, rest, _PROOF_ROWS - 1), _try_run(engine, inputs, _PROOF_ROWS)
        if others is None or together is None:
            return first, "it runs one row, but not several"
        for spec, *parts, joint in zip(signature.outputs, alone, others, together, strict=True):
            difference = _difference(spec, parts, joint)
            if difference:
                return first, difference
        return first, ""
    return None, "no made-up input of several rows fits this model"


def _difference(spec: TensorSpec, parts: Sequence[Array], joint: Array) -> str:
    """How rows that ran together differ from the same rows run alone; empty where they do not."""
    for array, rows in zip((*parts, joint), (1, _PROOF_ROWS - 1, _PROOF_ROWS), strict=True):
        if array.ndim == 0 or array.shape[0] != rows:
            return f"output '{spec.name}' has shape {list(array.shape)} for {rows} rows: its axis 0 does not count them"
    if any(part.shape[1:] != joint.shape[1:] for part in parts):
        return f"output '{spec.name}' has another shape when rows run together"
    apart = np.concatenate(parts)
    if apart.dtype.kind not in "fV":  # V: bfloat16
        same = np.array_equal(apart, joint)
    else:
        short = apart.dtype.itemsize == 2
        tolerance = 3e-2 if short else 1e-3
        one, other = apart.astype(np.float64), joint.astype(np.float64)
        finite = one[np.isfinite(one)]
        scale = float(np.abs(finite).max()) if finite.size else 1.0
        same = np.allclose(one, other, rtol=tolerance, atol=tolerance * min(1.0, scale), equal_nan=True)
    return "" if same else f"output '{spec.name}' depends on which rows run together"


def _first_passing(engine: Engine[Any]) -> Arrays | None:
    for _, inputs in _made_up(engine.signature, 1):
        if _try_run(engine, inputs, 1) is not None:
            return inputs
    return None


def _measure(engine: Engine[Any], inputs: Arrays, max_rows: int, inline_below_us: int, note: str) -> WarmUp:
    """Times a run and tells the engine what came out."""
    signature = engine.signature
    rows = max_rows if signature.batched else 1
    full = tuple([np.repeat(array, rows, axis=0) for array in inputs]) if signature.batched else inputs
    run_us = _time_us(engine, inputs, 1)
    if rows > 1 and run_us < inline_below_us:
        run_us = _time_us(engine, full, rows)
    inline = run_us < inline_below_us
    if engine.settle(small=inline):
        _run(engine, inputs, 1)
    return WarmUp(signature, run_us, inline, passed=True, note=note)


def _time_us(engine: Engine[Any], inputs: Arrays, rows: int) -> int:
    """Median time of a few runs, copying into the slot included; of one where it is long."""
    slot = engine.new_slot(rows)
    times: list[float] = []
    for _ in range(1 + _TIMED_RUNS):
        started = time.perf_counter()
        slot.load([inputs], rows)
        engine.run(slot, rows)
        times.append((time.perf_counter() - started) * 1e6)
        if sum(times) > _TIMED_US:
            break
    return int(statistics.median(times[1:] or times))


def _run(engine: Engine[Any], inputs: Arrays, rows: int) -> list[Array]:
    slot = engine.new_slot(rows)
    slot.load([inputs], rows)
    return [np.array(output) for output in engine.run(slot, rows)]


def _try_run(engine: Engine[Any], inputs: Arrays, rows: int) -> list[Array] | None:
    try:
        return _run(engine, inputs, rows)
    except Exception as error:  # noqa: BLE001  (engines raise what they like; here it only says that the input is wrong)
        log.debug("a made-up input did not pass: %s", error)
        return None


def _made_up(signature: Signature, rows: int) -> Iterator[tuple[str, Arrays]]:
    """Inputs to try, with the name of how they were filled."""
    seen: set[tuple[str, tuple[tuple[int, ...], ...]]] = set()
    for fill in _FILLS:
        for free in _FREE_SIZES:
            shapes = tuple([_shape(spec, rows, free, batched=signature.batched) for spec in signature.inputs])
            elements = sum(math.prod(shape) for shape in shapes)
            if (fill, shapes) in seen or (free > 1 and elements > _MOST_ELEMENTS * rows):
                continue
            seen.add((fill, shapes))
            random = np.random.default_rng(0)
            specs = zip(signature.inputs, shapes, strict=True)
            yield fill, tuple([_filled(spec.dtype, shape, fill, random) for spec, shape in specs])


def _shape(spec: TensorSpec, rows: int, free: int, *, batched: bool) -> tuple[int, ...]:
    shape = tuple([free if size < 0 else size for size in spec.shape])
    return (rows, *shape[1:]) if batched else shape


def _filled(dtype: np.dtype[Any], shape: tuple[int, ...], fill: str, random: np.random.Generator) -> Array:
    """Elements that are valid for the type; random ones differ from row to row."""
    if dtype == OBJECT:
        words = random.choice(_WORDS, shape) if fill == "random" else np.full(shape, "1" if fill == "ones" else "0")
        return np.asarray(words).astype(object)
    if fill != "random":
        return np.full(shape, fill == "ones").astype(dtype)
    if dtype.kind not in "biu":
        return np.asarray(random.standard_normal(shape)).astype(dtype)
    array = np.asarray(random.integers(0, 2, shape)).astype(dtype)
    if array.ndim and array.size:
        first = array.reshape(array.shape[0], -1)[:, 0]
        first[...] = np.arange(array.shape[0]) % 2
    return array


def _check_rows_are_free(signature: Signature) -> None:
    """Raises ConfigError where no proof could help; what the file says of outputs may be left open."""
    if not signature.inputs:
        raise ConfigError("batching.enabled is true, but the model has no inputs")
    for spec in signature.inputs:
        if not spec.shape or spec.shape[0] >= 0:
            raise ConfigError(
                f"batching.enabled is true, but input '{spec.name}' is {spec}: "
                "its first dimension is not free to count rows"
            )
