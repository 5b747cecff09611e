"""Builds the fake plans. `FAKE_TENSORRT_BUILD` says what goes wrong, or how long it takes."""

from __future__ import annotations

import ctypes
import json
import os
import time
from typing import Any

import onnx

import tensorrt as trt
from tensorrt.refitter import refittable
from tensorrt.runtime import plan_bytes

_WISHES = json.loads(os.environ.get("FAKE_TENSORRT_BUILD", "{}"))


class Builder:
    logger: Any

    def __init__(self, logger: Any) -> None:
        if trt.device is not None:
            trt.need_device()
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags, self.logger)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self.logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        dynamic = [each.name for each in network._inputs if -1 in each.shape and not each.is_shape_tensor]
        for profile in config._profiles or [{}]:
            missing = [name for name in dynamic if name not in profile]
            if missing:
                self.logger.tell(f"Network has dynamic inputs, but no optimization profile for {missing[0]}")
                return None
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", None, 2)
        monitor.step_complete("Building Engine", 0)
        monitor.phase_start("Tactic Selection", "Building Engine", 10)
        for step in range(10):
            time.sleep(_WISHES.get("step_s", 0))
            if step == 5 and self._goes_wrong():
                return None
            if not monitor.step_complete("Tactic Selection", step):
                return None
        monitor.phase_finish("Tactic Selection")
        monitor.phase_finish("Building Engine")
        cache = config._cache
        for each in network._inputs:
            cache.entries[f"{each.name} {config.builder_optimization_level}"] = 1
        fixed = {each.name: [list(each.shape)] * 3 for each in network._inputs if -1 not in each.shape}
        profiles = [{**fixed, **profile} for profile in config._profiles] or [fixed]
        flags = sorted(each.name for each in config._flags)
        more = {"flags": flags, "typed": network._typed, "settings": config._told()}
        if trt.BuilderFlag.REFIT in config._flags:
            more["weights"] = refittable(network._model)
        if trt.BuilderFlag.VERSION_COMPATIBLE in config._flags:
            more["version_compatible"] = True
        return bytearray(plan_bytes(network._model, profiles, **more))

    def _goes_wrong(self) -> bool:
        match _WISHES.get("fault"):
            case "crash":
                print("Assertion `tactics.size() > 0' failed.", flush=True)
                ctypes.string_at(0)
            case "refuse":
                self.logger.tell("Error Code 10: Could not find any implementation for node MatMul_1.")
                return True
            case "exit":
                os._exit(3)
        return False


class _Tensor:
    def __init__(self, name: str, shape: tuple[int, ...], is_shape_tensor: bool) -> None:
        self.name, self.shape, self.is_shape_tensor = name, shape, is_shape_tensor


class INetworkDefinition:
    num_inputs: int

    def __init__(self, flags: int, logger: Any) -> None:
        self._typed = bool(flags & 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._logger = logger
        self._inputs: list[_Tensor] = []
        self._model = b""

    def get_input(self, index: int) -> _Tensor:
        return self._inputs[index]

    def __getattr__(self, name: str) -> Any:
        if name == "num_inputs":
            return len(self._inputs)
        raise AttributeError(name)


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    num_errors: int

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network = network
        self.num_errors = 0

    def parse_from_file(self, model: str) -> bool:
        try:
            loaded = onnx.load(model)
        except Exception:  # noqa: BLE001
            self.num_errors = 1
            return False
        reshaping = {node.input[1] for node in loaded.graph.node if node.op_type == "Reshape"}
        constants = {each.name for each in loaded.graph.initializer}
        for each in loaded.graph.input:
            if each.name not in constants:
                dims = each.type.tensor_type.shape.dim
                shape = tuple([dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims])
                self._network._inputs.append(_Tensor(each.name, shape, each.name in reshaping))
        self._network._model = loaded.SerializeToString()
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError("Failed to parse the\nmodel")


class IOptimizationProfile(dict[str, Any]):
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        self[input] = [list(min), list(opt), list(max)]

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        """Bounds values; nothing here needs them."""


class ITimingCache:
    def __init__(self, entries: dict[str, int]) -> None:
        self.entries = entries

    def serialize(self) -> Any:
        return bytearray(json.dumps(self.entries).encode())


class IProgressMonitor:
    def __init__(self) -> None:
        self.ready = True


class IBuilderConfig:
    builder_optimization_level: int
    progress_monitor: Any

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._profiles: list[IOptimizationProfile] = []
        self._flags = {trt.BuilderFlag.TF32}
        self._cache = ITimingCache({})
        self._pools: dict[str, int] = {}
        self.builder_optimization_level = 3

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = pool_size

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache:
        content = bytes(serialized_timing_cache)
        return ITimingCache(json.loads(content) if content else {})

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache

    def _told(self) -> dict[str, Any]:
        return {"level": self.builder_optimization_level, **self._pools}
