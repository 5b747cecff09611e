"""The limit: ONNX Runtime in this process, with nothing around it, at its best batch and thread setting."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from bench import models

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """One way to run a model in process."""

    batch_rows: int
    threads: int  # that share one run
    callers: int = 1  # threads that each run batches of their own, on one session

    def __str__(self) -> str:
        callers = f", {self.callers} callers" if self.callers > 1 else ""
        return f"{self.batch_rows} rows, {self.threads} threads{callers}"


@dataclass(frozen=True)
class Speed:
    """What one setting reached."""

    setting: Setting
    rows_per_s: float
    p50_us: float  # of a run, not of a row
    p99_us: float
    cpu_us_per_row: float


def session_of(path: Path, threads: int) -> Any:
    """A CPU session whose idle threads do not spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def grid(model: str, most_callers: int = 0) -> list[Setting]:
    """The settings worth trying for a model on this machine.

    Args:
        model: Its name.
        most_callers: No more threads that call the session at once; 0 = as many as there are cores.
    """
    cores = len(os.sched_getaffinity(0))
    if model == "tiny":
        return [Setting(rows, 1) for rows in (1, 8, 32)]
    one_caller = [Setting(rows, threads) for rows in (1, 4, 8) for threads in sorted({1, cores})]
    callers = min(cores, most_callers or cores)
    return one_caller if callers == 1 else [*one_caller, Setting(1, 1, callers), Setting(4, 1, callers)]


def measure(model: str, setting: Setting, seconds: float) -> Speed:
    """Runs one setting for a while."""
    session = session_of(models.path_of(model), setting.threads)
    feed = {"x": models.rows_of(model, setting.batch_rows)}
    session.run(None, feed)
    cpu_s, began_s = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(setting.callers) as pool:
        parts = list(pool.map(lambda _: _run_until(session, feed, began_s + seconds), range(setting.callers)))
    elapsed_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    took_us = np.concatenate(parts) * 1e6
    rows = took_us.size * setting.batch_rows
    p50_us, p99_us = np.percentile(took_us, [50, 99])
    return Speed(setting, rows / elapsed_s, float(p50_us), float(p99_us), cpu_s * 1e6 / rows)


def _run_until(session: Any, feed: dict[str, models.Array], end_s: float) -> models.Array:
    took_s: list[float] = []
    now_s = time.perf_counter()
    while now_s < end_s or not took_s:
        began_s = now_s
        session.run(None, feed)
        now_s = time.perf_counter()
        took_s.append(now_s - began_s)
    return np.array(took_s)
