"""ONNX breadth: what plain ONNX Runtime passes of the `onnx` package's own tests, Forno serves alike.

Models are served by the hundred from one repository, and asked over gRPC twice: with raw tensors and with
typed values. Answers have to be equal to plain ONNX Runtime's in every bit, not close. What forno.v1 cannot
carry is refused at load, with a text that says why.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from tests.e2e import onnx_cases
from tests.e2e.forno_server import ROOT, FornoServer
from tests.e2e.onnx_cases import Case, Outcome

from forno.server.config import ModelSettings
from forno.server.errors import ConfigError
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RESULTS = ROOT / "bench" / "results" / "onnx_breadth.json"
MODELS_PER_SERVER = 250
FAST_STEP = 10
START_LIMIT_S = 120
CALL_LIMIT_S = 60
# counted with onnx 1.23.2 and onnxruntime 1.32.0
SERVED_AT_LEAST = 1690
REFUSED_AT_LEAST = 159

Mismatches = list[str]


@pytest.fixture(scope="module")
def some_cases() -> list[Case]:
    return list(onnx_cases.collect(FAST_STEP))


@pytest.mark.parametrize("transport", ["envoy", "grpc"])
def test_every_tenth_model_answers_like_plain_onnx_runtime(some_cases, transport, tmp_path):
    mismatches, served = serve_and_compare(some_cases, transport, tmp_path)
    assert mismatches == []
    assert served >= SERVED_AT_LEAST // FAST_STEP


def test_every_tenth_model_with_other_types_is_refused(some_cases, tmp_path):
    assert asyncio.run(not_refused(some_cases, tmp_path)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_models_answer_like_plain_onnx_runtime_or_are_refused(tmp_path):
    cases = list(onnx_cases.collect())
    mismatches, served = serve_and_compare(cases, "envoy", tmp_path)
    accepted = asyncio.run(not_refused(cases, tmp_path))
    write_results(cases, mismatches, accepted)
    counts = Counter(case.outcome for case in cases)
    assert mismatches == []
    assert accepted == []
    assert served >= SERVED_AT_LEAST
    assert counts[Outcome.NOT_CARRIED] >= REFUSED_AT_LEAST


def serve_and_compare(cases: Sequence[Case], transport: str, folder: Path) -> tuple[Mismatches, int]:
    """Serves every model that passes, a few hundred at a time.

    Returns:
        Differences found, and how many models answered right.
    """
    passing = iter([case for case in cases if case.outcome is Outcome.PASSES])
    mismatches: Mismatches = []
    served = 0
    while group := list(islice(passing, MODELS_PER_SERVER)):
        repository = folder / f"models-{served}"
        for case in group:
            write_model(case, repository / case.name / "1")
        with FornoServer(repository, transport=transport, ready=False) as server, ThreadPoolExecutor(4) as pool:
            server.wait_ready(START_LIMIT_S)
            predict = predictor_pb2_grpc.PredictorStub(server.channel).Predict
            found = list(pool.map(partial(compare, predict), group))
        served += sum(not texts for texts in found)
        mismatches += [text for texts in found for text in texts]
    return mismatches, served


def compare(predict: Callable[..., predictor_pb2.PredictResponse], case: Case) -> Mismatches:
    """Asks one model, with raw and with typed tensors."""
    found: Mismatches = []
    for data_set, answers in zip(case.data_sets, case.answers, strict=True):
        for form, encode in (("raw", tensors.encode), ("typed", tensors.encode_typed)):
            inputs = [encode(name, array) for name, array in data_set.inputs.items()]
            request = predictor_pb2.PredictRequest(model=case.name, inputs=inputs)
            try:
                response = predict(request, timeout=CALL_LIMIT_S)
            except grpc.RpcError as error:
                found.append(f"{case.name}, {form}: {error.code().name}: {error.details()}")
                continue
            got = [tensors.decode(tensor) for tensor in response.outputs]
            found += [f"{case.name}, {form}: {text}" for text in differences(answers, got)]
    return found


def differences(answers: Sequence[onnx_cases.Array], got: Sequence[onnx_cases.Array]) -> Iterator[str]:
    if len(got) != len(answers):
        yield f"{len(got)} outputs, expected {len(answers)}"
        return
    for index, (want, have) in enumerate(zip(answers, got, strict=True)):
        if (want.dtype, want.shape) != (have.dtype, have.shape):
            yield f"output {index} is {have.dtype}{have.shape}, expected {want.dtype}{want.shape}"
        elif not onnx_cases.same(want, have):
            yield f"output {index} is {have.ravel()[:8]}, expected {want.ravel()[:8]}"


async def not_refused(cases: Sequence[Case], folder: Path) -> list[str]:
    """Models of other types that load nevertheless, or fail without a word on which type it was."""
    found = []
    for case in cases:
        if case.outcome is not Outcome.NOT_CARRIED:
            continue
        path = write_model(case, folder / "refused" / case.name)
        model = Model(case.name, "1", path, ModelSettings(), Metrics().model(case.name, "1"))
        try:
            await model.load()
        except ConfigError as error:
            if not any(kind in str(error) for kind in case.why.split(", ")):
                found.append(f"{case.name}: refused, but the text does not name {case.why}: {error}")
        else:
            found.append(f"{case.name}: loaded, although it has {case.why}")
            await model.close(0)
    return found


def write_model(case: Case, folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    path.write_bytes(case.model.SerializeToString())
    return path


def write_results(cases: Sequence[Case], mismatches: Mismatches, accepted: Sequence[str]) -> None:
    """Leaves the counts where the other measurements lie."""
    by_outcome = {outcome: [case for case in cases if case.outcome is outcome] for outcome in Outcome}
    facts = {
        "command": "make soak TESTS=tests/e2e/test_onnx_breadth.py",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "numpy")},
        "models": len(cases),
        "served_alike": len(by_outcome[Outcome.PASSES]) - len({text.partition(",")[0] for text in mismatches}),
        "of_which_large_architectures": sum(case.test.kind == "real" for case in by_outcome[Outcome.PASSES]),
        "refused_by_type": Counter(case.why for case in by_outcome[Outcome.NOT_CARRIED]),
        "refused_by_type_total": len(by_outcome[Outcome.NOT_CARRIED]),
        "not_loaded_by_plain_onnx_runtime": len(by_outcome[Outcome.NOT_LOADED]),
        "failed_by_plain_onnx_runtime": {case.name: case.why for case in by_outcome[Outcome.FAILS]},
        "mismatches": mismatches,
        "not_refused": list(accepted),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
