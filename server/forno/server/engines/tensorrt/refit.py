"""Puts the weights of a model into a plan that was built of another model of the same structure.

Done in the process that builds, with a plan that nobody runs: TensorRT leaves undefined what a refit does to runs that
are under way. What comes out is a plan like any other, with the new weights in it.

Plans are built with BuilderFlag.REFIT for that. REFIT_IDENTICAL makes faster ones, but they answer rightly only by the
weights that they were built with. STRIP_PLAN makes small ones without weights, which need them anew at each load.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server.engines.tensorrt.cache import keep
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

    from forno.server.engines.tensorrt.library import Library

_MADE = "tmp_"
"""What the names of weights begin with that the ONNX parser makes of others, such as those of a batch normalization."""
_FOLDED_INTO = 2  # weights that it makes of one batch normalization: a factor and a shift
_MOST_NAMED = 3


def refit(job: dict[str, Any], found: Library) -> dict[str, Any]:
    """Makes the plan of a job from its relative.

    Args:
        job: `model` and `plan`, paths; `relative`, see `cache.Relative`; `version_compatible`.
        found: TensorRT.

    Returns:
        What was made: its bytes, and how many weights were put in.

    Raises:
        ConfigError: The plan does not take the weights of this model.
    """
    logger = found.new_logger()
    relative, kept = job["relative"], Path(job["relative"]["plan"])
    runtime = found.module.Runtime(logger)
    if job["version_compatible"]:
        runtime.engine_host_code_allowed = True
    with kept.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise ConfigError(f"TensorRT cannot load {kept}: {logger.taken()}")
    if not engine.refittable:
        raise ConfigError(f"{kept} takes no weights: it was built without tensorrt.refit")
    refitter = found.module.Refitter(engine, logger)
    _check(kept, relative, refitter.get_all_weights())
    parser = found.module.OnnxParserRefitter(refitter, logger)  # holds the weights until they are in the plan
    if not parser.refit_from_file(job["model"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = "; ".join(dict.fromkeys([" ".join(error.desc().split()) for error in errors])) or logger.taken()
        raise ConfigError(f"{kept} does not take its weights: {told}")
    missing = refitter.get_missing_weights()
    if missing:
        raise ConfigError(f"{kept} needs weights that the model does not have: {_named(missing)}")
    if not refitter.refit_cuda_engine():
        raise ConfigError(f"{kept} does not take its weights: {logger.taken()}")
    plan = engine.serialize()
    if plan is None:
        raise ConfigError(f"TensorRT cannot write {kept} with other weights: {logger.taken()}")
    view = memoryview(plan)
    keep(Path(job["plan"]), view)
    return {"bytes": view.nbytes, "weights": len(relative["changed"])}


def _check(kept: Path, relative: dict[str, Any], replaceable: list[str]) -> None:
    """Refuses where a weight that differs has become part of the plan: it would answer by the old one's value."""
    taken = set(replaceable)
    made = sum(name.startswith(_MADE) for name in replaceable)
    if made >= _FOLDED_INTO * relative["foldings"]:
        taken |= set(relative["folded"])
    fixed = set(relative["changed"]) - taken
    if fixed:
        raise ConfigError(
            f"{kept} does not take all of the {len(relative['changed'])} weights that differ: "
            f"{_named(fixed)} became part of it when it was built"
        )


def _named(names: Collection[str]) -> str:
    """A few of them by name, and how many more there are."""
    first = sorted(names)[:_MOST_NAMED]
    more = len(names) - len(first)
    return ", ".join([f"'{name}'" for name in first]) + (f" and {more} more" if more else "")
