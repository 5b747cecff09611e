"""The process that makes one plan: `python -m forno.server.engines.tensorrt.builder FD`, with a job on its input.

It builds it, or puts other weights into one that is kept (`refit.py`). Builds take gigabytes and minutes, and can
crash; so they happen apart. What happens is told in lines of JSON on the file descriptor FD: `progress`, then `built`
or `failed`. Whoever started it may kill it at any time: nothing is left but unfinished files, which the next build
removes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from forno.kernels.devices import DeviceError, open_device
from forno.server.engines.onnx_float16 import convert
from forno.server.engines.tensorrt import library
from forno.server.engines.tensorrt.cache import keep
from forno.server.engines.tensorrt.library import Library, sizes
from forno.server.engines.tensorrt.refit import refit
from forno.server.errors import ConfigError

_TELL_EVERY_S = 0.2


class Progress:
    """How far a build is: phases within phases, each of so many steps. Any thread.

    Args:
        tell: Called with what is told, at most a few times a second.
        clock: Seconds.
    """

    def __init__(self, tell: Any, clock: Any = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._told_s = float("-inf")
        self._most = 0.0
        self._phases: dict[str, list[Any]] = {}  # parent, steps, steps that are done
        self._lock = threading.Lock()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins, as a step of its parent's."""
        with self._lock:
            self._phases[phase] = [parent, max(steps, 1), 0]
            self._say(phase)

    def step(self, phase: str, step: int) -> None:
        """A step is done, counted from 0."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase][2] = min(step + 1, self._phases[phase][1])
                self._say(phase)

    def finish(self, phase: str) -> None:
        """A phase is over."""
        with self._lock:
            self._phases.pop(phase, None)

    def done(self) -> float:
        """The part that is done, from 0 to 1."""
        return max([self._within(name) for name, (parent, _, _) in self._phases.items() if not parent], default=0.0)

    def _within(self, phase: str) -> float:
        _, steps, done = self._phases[phase]
        below = [self._within(name) for name, (parent, _, _) in self._phases.items() if parent == phase]
        return float(min(1.0, (done + max(below, default=0.0)) / steps))

    def _say(self, phase: str) -> None:
        self._most = max(self._most, self.done())  # phases are not all known from the start: never go back
        now_s = self._clock()
        if now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s = now_s
            self._tell({"progress": {"phase": phase, "done": round(self._most, 3)}})


def make(job: dict[str, Any], found: Library, progress: Progress) -> dict[str, Any]:
    """Makes the plan of a job, of a model that is converted first where its `precision` needs that; see `build`."""
    plan = Path(job["plan"])
    # Its name has it found by the next if this is killed.
    with tempfile.TemporaryDirectory(dir=plan.parent, prefix=plan.name) as folder:
        if found.converts(job["precision"]):
            job = {**job, "model": str(convert(Path(job["model"]), Path(folder), "tensorrt.precision"))}
        return refit(job, found) if job["relative"] else build(job, found, progress)


def build(job: dict[str, Any], found: Library, progress: Progress) -> dict[str, Any]:
    """Builds the plan of a job.

    Args:
        job: `model` and `plan`, paths; `timings`, a path; and the options.
        found: TensorRT.
        progress: Told of its phases.

    Returns:
        What was built: its bytes.

    Raises:
        ConfigError: The model cannot be built as asked.
    """
    module, logger = found.module, found.new_logger()
    builder = module.Builder(logger)
    network = builder.create_network(found.network_flags(job["precision"]))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(job["model"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = "; ".join(dict.fromkeys([" ".join(error.desc().split()) for error in errors])) or logger.taken()
        raise ConfigError(f"TensorRT cannot read it: {told}")
    config = builder.create_builder_config()
    profiles = profiles_for(network, job)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            if is_shape(network, name):
                profile.set_shape_input(name, least, best, most)
            else:
                profile.set_shape(name, least, best, most)
        if config.add_optimization_profile(profile) < 0:
            raise ConfigError(f"tensorrt.profiles is refused: {logger.taken()}")
    configure(config, found, job)
    config.progress_monitor = monitor = monitor_type(module)(progress)  # must live until the plan is built
    timings = Path(job["timings"])
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise ConfigError(f"TensorRT cannot build it: {logger.taken()}")
    content = memoryview(plan)
    keep(Path(job["plan"]), content)
    keep(timings, memoryview(config.get_timing_cache().serialize()))
    return {"bytes": content.nbytes}


def configure(config: Any, found: Library, job: dict[str, Any]) -> None:
    """Tells the builder what the settings say."""
    flag = found.module.BuilderFlag
    config.builder_optimization_level = job["optimization_level"]
    if job["workspace_bytes"]:
        config.set_memory_pool_limit(found.module.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    for each in found.precision_flags(job["precision"]):
        config.set_flag(each)
    if job["version_compatible"]:
        config.set_flag(flag.VERSION_COMPATIBLE)
    if job["refit"]:
        config.set_flag(flag.REFIT)
    if not job["tf32"]:
        config.clear_flag(flag.TF32)


def profiles_for(network: Any, job: dict[str, Any]) -> list[dict[str, list[list[int]]]]:
    """Least, best and most of every input whose shape is open, for each profile; none where all shapes are fixed.

    Raises:
        ConfigError: The settings do not say what they must, or say what does not fit the model.
    """
    inputs = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        inputs[tensor.name] = sizes(tensor.shape)
    shaped = [name for name in inputs if is_shape(network, name)]
    is_open = [name for name, shape in inputs.items() if min(shape, default=0) < 0]
    if job["profiles"]:
        return [_checked(given, inputs, [*is_open, *shaped], shaped) for given in job["profiles"]]
    unsaid = [f"'{name}' of {list(inputs[name])}" for name in is_open if min(inputs[name][1:], default=0) < 0]
    unsaid += [f"'{name}', which says a shape" for name in shaped]
    if unsaid:
        raise ConfigError(
            f"tensorrt.profiles must say what shapes a plan is built for: of input {', of input '.join(unsaid)} "
            "more is open than the rows"
        )
    most = job["max_rows"]
    rows = {name: [[count, *inputs[name][1:]] for count in (1, most, most)] for name in is_open}
    return [rows] if rows else []


def _checked(
    given: dict[str, dict[str, list[int]]], inputs: dict[str, tuple[int, ...]], needed: list[str], shaped: list[str]
) -> dict[str, list[list[int]]]:
    for name in given:
        if name not in inputs:
            raise ConfigError(f"tensorrt.profiles has '{name}', which is no input; the model has {', '.join(inputs)}")
    for name in needed:
        if name not in given:
            raise ConfigError(f"tensorrt.profiles has no shapes for input '{name}' of {list(inputs[name])}")
    profile = {}
    for name, bounds in given.items():
        declared = inputs[name]
        for which, shape in bounds.items():
            fits = len(shape) == len(declared) and all(
                size in (-1, have) for size, have in zip(declared, shape, strict=True)
            )
            if not fits and name not in shaped:
                raise ConfigError(
                    f"tensorrt.profiles has {which} {shape} for input '{name}', which is {list(declared)}"
                )
        profile[name] = [bounds[which] for which in ("min", "opt", "max")]
    return profile


def is_shape(network: Any, name: str) -> bool:
    """Whether the input says a shape, so that a profile bounds its values."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return any(bool(each.is_shape_tensor) for each in inputs if each.name == name)


def monitor_type(module: Any) -> type:
    """The type of what TensorRT tells its progress."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, progress: Progress) -> None:
            module.IProgressMonitor.__init__(self)
            self._progress = progress

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._progress.step(phase_name, step)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._progress.finish(phase_name)

    return Monitor


def main() -> None:
    """Reads a job, builds, and tells."""
    told = int(sys.argv[1])

    def tell(message: dict[str, Any]) -> None:
        os.write(told, json.dumps(message).encode() + b"\n")

    job = json.load(sys.stdin)
    try:
        device = open_device(job["device"], job["ordinal"])
        device.attach()  # for the whole life of this process: TensorRT takes the GPU that is current
        tell({"built": make(job, library.find(), Progress(tell))})
    except (ConfigError, DeviceError) as error:
        tell({"failed": str(error)})


if __name__ == "__main__":
    main()
