"""What a GPU does by itself, with ONNX Runtime alone, and under Forno's batcher and slots: in one run.

Usage: python -m bench.gpu [--device cuda] [--model resnet50] [--rows 64] [--seconds 5] [--out bench/results]

Copies and kernels are in gigabytes a second of what they must move. `bare` is a loop of ONNX Runtime over one batch,
also where Forno has TensorRT run the model; `forno` answers single rows, batched up to as many, at 1, 2 and 3
instances: with always enough waiting, and in the sense of MLPerf's Server scenario, the largest Poisson load whose p99
is within 15 ms. `overlap` is the rate of three instances over that of one: what copies and computing gain side by side.
Where `mlcommons-loadgen` is installed, its LoadGen asks too, by its own clock. `--device cpu` runs all of it without a
GPU: to see that it does, not for its figures. Writes gpu-DEVICE-MODEL.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any
from unittest import mock

from bench import report
from bench.gpu_device import copies, kernels
from bench.gpu_engine import LATENCY_MS, bare, ours
from bench.gpu_models import SUBJECTS
from forno.kernels.devices import NAMES, DeviceError, open_device
from forno.kernels.devices.cpu import CpuDevice
from forno.server.engines import onnx_cuda

_GPU_ROWS, _CPU_ROWS = 256, 1  # of the kernels' batches
_GPU_COPY_BYTES, _CPU_COPY_BYTES = 1 << 28, 1 << 20
_INSTANCES = (1, 2, 3)


def measure(device: str, model: str, rows: int, seconds: float) -> dict[str, Any]:
    """All of it.

    Raises:
        SystemExit: There is no such device, or the model does not run there.
    """
    name, _, number = device.partition(":")
    is_cpu, ordinal = name == "cpu", int(number or 0)
    subject = SUBJECTS[model]
    if is_cpu and "engine" in subject.settings:
        raise SystemExit(f"'{model}' runs on a GPU alone, and --device is cpu")
    try:
        opened = open_device(name, ordinal)
    except DeviceError as error:
        raise SystemExit(str(error)) from None
    found: dict[str, Any] = {
        "copies_gb_per_s": copies(opened, _CPU_COPY_BYTES if is_cpu else _GPU_COPY_BYTES),
        "kernels": kernels(opened, _CPU_ROWS if is_cpu else _GPU_ROWS),
    }
    opened.close()
    path, batch = subject.path(), subject.rows(rows)
    base = bare(path, "cpu" if is_cpu else "cuda", ordinal, (subject.own_rows or subject.rows)(rows), seconds)
    found["bare_rows_per_s"] = round(base)
    found["forno"] = {}
    for instances in _INSTANCES:
        if is_cpu:  # the engine for GPUs, on the CPU's device; `device: cpu` would be the plain one
            with mock.patch.object(onnx_cuda, "open_device", return_value=CpuDevice(runtime_memory=True)):
                result = asyncio.run(ours(path, "cuda", batch, seconds, instances, rows, subject.settings))
        else:
            result = asyncio.run(ours(path, device, batch, seconds, instances, rows, subject.settings))
        result["offline_of_bare"] = round(result["offline_rows_per_s"] / base, 3)
        result["server_of_bare"] = round(result["server_rows_per_s"] / base, 3)
        found["forno"][str(instances)] = result
    one, three = (found["forno"][str(count)]["offline_rows_per_s"] for count in (_INSTANCES[0], _INSTANCES[-1]))
    found["overlap"] = round(three / one, 3)
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description="Measures a GPU, ONNX Runtime on it, and Forno around that.")
    parser.add_argument("--device", default="cuda", help=f"{', '.join(NAMES)}, or cuda:1 and so on")
    parser.add_argument("--model", default="resnet50", choices=sorted(SUBJECTS))
    parser.add_argument("--rows", type=int, default=64, help="of one batch")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    given = parser.parse_args()
    record = report.facts(
        "bench.gpu",
        f"{given.model} on {given.device}, in process, batches of {given.rows} rows, {given.seconds:g} s each",
        latency_limit_ms=LATENCY_MS,
        **measure(given.device, given.model, given.rows, given.seconds),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"gpu-{given.device.replace(':', '-')}-{given.model}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(
        json.dumps({key: record[key] for key in ("copies_gb_per_s", "kernels", "bare_rows_per_s", "forno")}, indent=1)
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
