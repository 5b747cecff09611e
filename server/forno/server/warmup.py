"""The first runs of a model: proves that it works, whether rows are independent, and how long a run takes.

A signature can only suggest that axis 0 counts rows. So three rows are run alone and together, and must come out the
same; a softmax or a mean over axis 0, a recurrent net or a random number shows itself here, not in a caller's answer.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.errors import ConfigError, EngineLost
from forno.v1.tensors import OBJECT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forno.server.config import BatchingSettings
    from forno.server.engines import Engine
    from forno.server.profiles import Profiles
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
_REPEATED_RUNS = 8  # a draw from a few values may come out the same by chance
_TIMED_US = 50_000  # what takes so long is far from the event loop anyway
_SAMPLING_US = 500_000  # longest search for the rows that run best; the rest is found out while serving
_GAIN = 1.03  # more rows must raise the rate by so much, or the search ends after one more try


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What the first runs have shown."""

    signature: Signature  # with `batched` decided
    run_us: int  # one run of `max_rows` rows, or of one row where that alone is too long to run on the event loop
    inline: bool  # whether runs are short enough for the event loop
    passed: bool  # whether a run has passed at all
    note: str  # what a person should know: why rows run alone, or that no run has passed; may be empty
    samples: tuple[tuple[int, float], ...] = ()  # rows and microseconds of runs: how time grows with rows
    shapes: tuple[tuple[int, ...], ...] = ()  # of the inputs that passed, one row where the model is batched


def warm_up(engine: Engine[Any], batching: BatchingSettings, inline_below_us: int) -> WarmUp:
    """Runs made-up inputs through a freshly opened engine and leaves it ready to make its slots. Blocks; any thread.

    Inputs are random at first, then ones, then zeros, with growing sizes for open dimensions, or the best ones of an
    engine that was built for some, until a run passes. If none passes, the model may still be fine: nothing made up
    fits what it wants, such as indexes into its own tables. It is then served unbatched, and the note says that no run
    has passed.

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


def unrepeatable(engine: Engine[Any]) -> str:
    """Says how the answers of equal runs differ; empty where they do not, or where nothing made up passes. Blocks."""
    inputs = _first_passing(engine)
    if inputs is None:
        return ""
    outputs = engine.signature.outputs
    started = time.perf_counter()
    first = _run(engine, inputs, 1)
    for run in range(1, _REPEATED_RUNS):
        if run > 1 and (time.perf_counter() - started) * 1e6 > _TIMED_US:
            break
        for spec, one, other in zip(outputs, first, _run(engine, inputs, 1), strict=True):
            if one.shape != other.shape or not alike(one, other):
                return f"output '{spec.name}' differs when the same input runs again"
    return ""


def _prove_rows(engine: Engine[Any]) -> tuple[Arrays | None, str]:
    """Inputs of one row that passed, and why rows are not taken as independent; empty where they are."""
    signature = engine.signature
    for fill, inputs in _made_up(signature, engine.profiles, _PROOF_ROWS):
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
    same = alike(np.concatenate(parts), joint)
    return "" if same else f"output '{spec.name}' depends on which rows run together"


def alike(one: Array, other: Array) -> bool:
    """Whether two arrays of one shape are the same but for rounding."""
    if one.dtype.kind not in "fV":  # V: bfloat16
        return np.array_equal(one, other)
    short = one.dtype.itemsize == 2
    tolerance = 3e-2 if short else 1e-3
    wide, other_wide = one.astype(np.float64), other.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    scale = float(np.abs(finite).max()) if finite.size else 1.0
    return np.allclose(wide, other_wide, rtol=tolerance, atol=tolerance * min(1.0, scale), equal_nan=True)


def _first_passing(engine: Engine[Any]) -> Arrays | None:
    for _, inputs in _made_up(engine.signature, engine.profiles, 1):
        if _try_run(engine, inputs, 1) is not None:
            return inputs
    return None


def _measure(engine: Engine[Any], inputs: Arrays, max_rows: int, inline_below_us: int, note: str) -> WarmUp:
    """Times runs and tells the engine what came out."""
    signature = engine.signature
    rows = max_rows if signature.batched else 1
    run_us = int(_median_us(_times_us(engine, inputs, 1)))
    if rows > 1 and run_us < inline_below_us:
        run_us = int(_median_us(_times_us(engine, inputs, rows)))
    inline = run_us < inline_below_us
    if engine.settle(small=inline):
        _run(engine, inputs, 1)
    shapes = tuple([array.shape for array in inputs])
    samples = _sample(engine, inputs, rows)
    return WarmUp(signature, run_us, inline, passed=True, note=note, shapes=shapes, samples=samples)


def _sample(engine: Engine[Any], inputs: Arrays, max_rows: int) -> tuple[tuple[int, float], ...]:
    """Times runs of 1, 2, 4... rows until more rows gain nothing, or too much time would go."""
    samples: list[tuple[int, float]] = []
    left_us, best_rate, misses = float(_SAMPLING_US), 0.0, 0
    rows = 1
    while misses < 2:  # one may be bad luck
        began = time.perf_counter()
        times_us = _times_us(engine, inputs, rows)
        left_us -= (time.perf_counter() - began) * 1e6
        kept_us = times_us[1:] or times_us
        samples += [(rows, run_us) for run_us in kept_us]
        rate = rows / max(_median_us(times_us), 1.0)
        misses = 0 if rate > best_rate * _GAIN else misses + 1
        best_rate = max(best_rate, rate)
        if rows == max_rows or 4 * max(kept_us) > left_us:  # two runs of twice the rows
            break
        rows = min(rows * 2, max_rows)
    return tuple(samples)


def _median_us(times_us: list[float]) -> float:
    ordered = sorted(times_us[1:] or times_us)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[~middle]) / 2


def _times_us(engine: Engine[Any], inputs: Arrays, rows: int) -> list[float]:
    """Times of a few runs, of two where they are long; bringing the rows together included, each by its own caller."""
    slot = engine.new_slot(rows)
    requests = [inputs] * rows
    times_us: list[float] = []
    while len(times_us) <= _TIMED_RUNS:
        started = time.perf_counter()
        slot.load(requests, rows)
        engine.run(slot, rows)
        times_us.append((time.perf_counter() - started) * 1e6)
        if sum(times_us) > _TIMED_US and len(times_us) > 1:
            break
    return times_us


def _run(engine: Engine[Any], inputs: Arrays, rows: int) -> list[Array]:
    slot = engine.new_slot(rows)
    slot.load([inputs], rows)
    return [np.array(output) for output in engine.run(slot, rows)]


def _try_run(engine: Engine[Any], inputs: Arrays, rows: int) -> list[Array] | None:
    try:
        return _run(engine, inputs, rows)
    except EngineLost:
        raise
    except Exception as error:  # noqa: BLE001  (engines raise what they like; here it only says that the input is wrong)
        log.debug("a made-up input did not pass: %s", error)
        return None


def _made_up(signature: Signature, profiles: Profiles, rows: int) -> Iterator[tuple[str, Arrays]]:
    """Inputs to try, with the name of how they were filled."""
    for fill in _FILLS:
        for shapes in _shapes(signature, profiles, rows):
            random = Random(0)  # noqa: S311  (no secret)
            specs = zip(signature.inputs, shapes, strict=True)
            yield fill, tuple([_filled(spec.dtype, shape, fill, random) for spec, shape in specs])


def _shapes(signature: Signature, profiles: Profiles, rows: int) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of all inputs to try, each once."""
    if profiles.ranges:
        best = [profile.best for profile in profiles.ranges]
        if signature.batched:
            best = [tuple([(rows, *shape[1:]) for shape in shapes]) for shapes in best]
        return list(dict.fromkeys(best))
    tried = []
    for free in _FREE_SIZES:
        shapes = tuple([_shape(spec, rows, free, batched=signature.batched) for spec in signature.inputs])
        if free == 1 or sum(math.prod(shape) for shape in shapes) <= _MOST_ELEMENTS * rows:
            tried.append(shapes)
    return list(dict.fromkeys(tried))


def _shape(spec: TensorSpec, rows: int, free: int, *, batched: bool) -> tuple[int, ...]:
    shape = tuple([free if size < 0 else size for size in spec.shape])
    return (rows, *shape[1:]) if batched else shape


def _filled(dtype: np.dtype[Any], shape: tuple[int, ...], fill: str, random: Random) -> Array:
    """Elements that are valid for the type; random ones differ from row to row.

    They are made of random bytes, for `numpy.random` would cost each start 10 ms and 2 MiB.
    """
    count = math.prod(shape)
    if dtype == OBJECT:
        words = random.choices(_WORDS, k=count) if fill == "random" else ["1" if fill == "ones" else "0"] * count
        return np.array(words, object).reshape(shape)
    if fill != "random":
        return np.full(shape, fill == "ones").astype(dtype)
    if dtype.kind not in "biu":
        even = np.frombuffer(random.randbytes(4 * count), np.int32) * (math.sqrt(3) / 2**31)  # mean 0, variance 1
        return even.reshape(shape).astype(dtype)
    array = (np.frombuffer(random.randbytes(count), np.uint8) & 1).reshape(shape).astype(dtype)
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
