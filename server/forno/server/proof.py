"""Proves that padding changes no answer: made-up rows of several lengths run alone, and padded together.

A model that ignores what its mask excludes passes; one that takes a mean over every position, or looks at the last one,
does not. What is proven is the very way that requests go: buckets, slot, run, and the cut back to each one's own size.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.warmup import alike
from forno.v1.tensors import OBJECT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from forno.server.engines import Engine
    from forno.server.shapes import Padding

    Array = np.ndarray[Any, np.dtype[Any]]
    Arrays = tuple[Array, ...]

log = logging.getLogger("forno.model")

_LENGTHS = ((1, 3, 8), (7, 2, 5), (6, 16, 11), (40, 33, 64))
_FILLS = ("ones", "few", "many", "negative")
_LEAST_TRIALS = 4
_LONG_S = 2.0  # a slow model is not kept from its start by more trials than are needed
_MOST_ELEMENTS = 1 << 22
_WORDS = ("bread", "oven", "flour", "salt", "1", "0")


def proven(engine: Engine[Any], padding: Padding, shapes: Sequence[tuple[int, ...]]) -> tuple[Padding | None, str]:
    """As much of a padding as is proven to change no answer, and why the rest is not. Blocks; any thread.

    Args:
        engine: A batched one; its signature's padding is the one that ran last.
        padding: What to prove.
        shapes: Of inputs of one row that have passed, which say what sizes other open dimensions have.
    """
    signature = engine.signature
    held: list[str] = []
    reasons: dict[str, str] = {}
    try:
        for name in padding.names:
            reasons[name] = _difference(engine, padding.only([name]), shapes)
            if not reasons[name]:
                held.append(name)
        together = padding.only(held)
        if len(held) > 1:
            reasons["together"] = _difference(engine, together, shapes)
            if reasons["together"]:
                held = []
    finally:
        engine.signature = signature
    why = "; ".join([f"'{name}': {reason}" for name, reason in reasons.items() if reason])
    return (together if held else None), why


def _difference(engine: Engine[Any], padding: Padding, shapes: Sequence[tuple[int, ...]]) -> str:
    """How padded rows are answered otherwise than alone; empty where they are not."""
    outputs = engine.signature.outputs
    if not any(cuts or spec.dtype.kind in "fV" for spec, cuts in zip(outputs, padding.outputs, strict=True)):
        return "its outputs are too coarse to prove that padding changes none of them"
    trials = 0
    started = time.perf_counter()
    for fill, lengths in _trials():
        if trials >= _LEAST_TRIALS and time.perf_counter() - started > _LONG_S:
            break
        rows = list(_rows(engine, padding, shapes, lengths, fill))
        if sum(array.size for row in rows for array in row) > _MOST_ELEMENTS:
            continue
        engine.signature = replace(engine.signature, padding=None)
        alone = [_try_run(engine, [row]) for row in rows]
        passed = [outputs for outputs in alone if outputs is not None]
        if len(passed) < len(rows):
            continue
        engine.signature = replace(engine.signature, padding=padding)
        joint = _try_run(engine, rows)
        if joint is None:
            return "rows that run alone do not run padded"
        for index, (row, own) in enumerate(zip(rows, passed, strict=True)):
            cuts = padding.fit(tuple([array.shape[1:] for array in row])).cuts
            for number, spec in enumerate(outputs):
                whole = joint[number][index : index + 1]
                part = whole[cuts[number]] if cuts is not None else whole
                if part.shape != own[number].shape:
                    return f"output '{spec.name}' has shape {list(part.shape)} padded, {list(own[number].shape)} alone"
                if not alike(own[number], part):
                    return f"output '{spec.name}' is another one with padding"
        trials += all(np.isfinite(array).any() for array in _floats(joint))
    return "" if trials >= _LEAST_TRIALS else "no made-up inputs of several sizes fit the model, so nothing is proven"


def _trials() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every fill with all lengths, the first few of which meet all of both."""
    for offset in range(len(_FILLS)):
        for index, fill in enumerate(_FILLS):
            yield fill, _LENGTHS[(index + offset) % len(_LENGTHS)]


def _rows(
    engine: Engine[Any], padding: Padding, shapes: Sequence[tuple[int, ...]], lengths: Collection[int], fill: str
) -> Iterator[Arrays]:
    """One row of each length, with every padded axis of that length, or of one near to it."""
    random = np.random.default_rng(sum(lengths) + len(fill))
    names = padding.names
    for length in lengths:
        sizes = {name: max(1, length - index) for index, name in enumerate(names)}
        arrays = []
        for spec, padded, shape in zip(engine.signature.inputs, padding.inputs, shapes, strict=True):
            size = list(shape)
            for axis, name in padded.axes:
                size[axis] = sizes[name]
            arrays.append(_filled(spec.dtype, tuple(size), fill, random))
        yield tuple(arrays)


def _filled(dtype: np.dtype[Any], shape: tuple[int, ...], fill: str, random: np.random.Generator) -> Array:
    """Elements that show what a model looks at: signs for a maximum, masks of ones and mixed ones, indexes."""
    if dtype == OBJECT:
        return np.asarray(random.choice(_WORDS, shape)).astype(object)
    if dtype.kind in "biu":
        low, high = {"few": (0, 2), "many": (1, 8)}.get(fill, (1, 2))
        array = np.asarray(random.integers(low, high, shape)).astype(dtype)
        array.reshape(array.shape[0], -1)[:, :1] = 1  # a mask that leaves nothing over has no answer to compare
        return array
    array = np.asarray(random.standard_normal(shape))
    if fill == "ones" and random.random() < 0.5:
        array = np.ones(shape)
    return (-np.abs(array) if fill == "negative" else array).astype(dtype)


def _floats(arrays: Sequence[Array]) -> Iterator[Array]:
    for array in arrays:
        if array.dtype.kind in "fV":
            yield array.astype(np.float64)


def _try_run(engine: Engine[Any], rows: Sequence[Arrays]) -> list[Array] | None:
    try:
        slot = engine.new_slot(len(rows))
        slot.load(rows, len(rows))
        outputs = [np.array(output) for output in engine.run(slot, len(rows))]
    except Exception as error:  # noqa: BLE001  (engines raise what they like; here it only says that the input is wrong)
        log.debug("a made-up input did not pass: %s", error)
        return None
    if any(output.ndim == 0 or output.shape[0] != len(rows) for output in outputs):
        return None
    return outputs
