"""The `label` codec: scores become the likeliest label and how likely it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.errors import ConfigError, EngineFailed
from forno.v1 import tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.endpoints.payload import Decoded
    from forno.server.endpoints.settings import LabelOutput
    from forno.server.processing import Ranking
    from forno.server.request import Answer
    from forno.server.signature import Signature

    Array = np.ndarray[Any, np.dtype[Any]]

_CONFIDENCE_DIGITS = 4


class LabelWriter:
    """Writes {"prediction", "confidence"} for each row. Event loop only.

    Args:
        settings: The codec's.
        signature: The model's.
        where: Path of the settings, for messages.

    Raises:
        ConfigError: The model's outputs are not what the settings say.
    """

    def __init__(self, settings: LabelOutput, signature: Signature, where: str) -> None:
        self._labels = settings.labels
        self._top_k = settings.top_k
        self._logits = settings.scores == "logits"
        self._scores_at = _scores_at(settings, signature, where)
        self._label_at = _label_at(settings, signature, where)
        self._spec = spec = signature.outputs[self._scores_at]
        self._one_row = len(spec.shape) == 1 and not signature.batched
        classes = spec.shape[-1] if len(spec.shape) == 2 or self._one_row else 1
        if len(spec.shape) not in (1, 2):
            raise ConfigError(f"{where}.tensor: '{spec.name}' is {spec}, expected one score a class for each row")
        if self._labels and classes >= 0 and len(self._labels) != max(classes, 2):
            raise ConfigError(
                f"{where}.labels has {len(self._labels)} names, but output '{spec.name}' is {spec}: "
                f"expected {max(classes, 2)}"
            )

    def write(self, answer: Answer, decoded: Decoded) -> Any:
        """One object, or a list of them where the request was a list."""
        scores = self._probabilities(answer.outputs[self._scores_at])
        named = None if self._label_at is None else answer.outputs[self._label_at].ravel().tolist()
        replies = [self._reply(row, named[number] if named else None) for number, row in enumerate(scores)]
        return replies if decoded.many or len(replies) != 1 else replies[0]

    def _probabilities(self, scores: Array) -> Array:  # [rows, classes]
        rows = scores.astype(np.float64)
        rows = rows.reshape(1, -1) if self._one_row else rows.reshape(len(rows), -1)
        if not np.isfinite(rows).all():
            raise EngineFailed(f"the model's output '{self._spec.name}' has scores that are not finite numbers")
        if rows.shape[1] == 1:  # of two classes, the second one's
            second = 1 / (1 + np.exp(-np.clip(rows, -500, 500))) if self._logits else rows
            return np.hstack([1 - second, second])
        if self._logits:
            rows = np.exp(rows - rows.max(axis=1, keepdims=True))
            rows /= rows.sum(axis=1, keepdims=True)
        return rows

    def _reply(self, scores: Array, named: Any) -> dict[str, Any]:
        best = int(scores.argmax())
        if named is None:
            reply = self._entry(best, scores)
        else:
            chosen = self._class_of(named, best, len(scores))
            reply = self._entry(chosen, scores)
            if isinstance(named, str | bytes) or not self._labels:
                reply["prediction"] = named.decode(errors="replace") if isinstance(named, bytes) else named
        if self._top_k:
            order = np.argsort(-scores, kind="stable")[: self._top_k].tolist()
            reply["top"] = [self._entry(number, scores) for number in order]
        return reply

    def _class_of(self, named: Any, best: int, count: int) -> int:
        if isinstance(named, int):
            return named if 0 <= named < count else best
        return self._labels.index(named) if named in self._labels else best

    def _entry(self, number: int, scores: Array) -> dict[str, Any]:
        return _entry(self._labels, number, float(scores[number]))


class RankedWriter:
    """As `LabelWriter`, for a model that answers its best classes itself (`postprocess`). Event loop only.

    Args:
        ranking: What the model answers.
        settings: The codec's.
        signature: The model's.
        where: Path of the settings, for messages.

    Raises:
        ConfigError: The settings say what the model does not answer.
    """

    def __init__(self, ranking: Ranking, settings: LabelOutput, signature: Signature, where: str) -> None:
        spec = signature.outputs[ranking.index]
        if settings.tensor not in ("", spec.name) or settings.label_tensor:
            raise ConfigError(f"{where}: the model's `postprocess` ranks '{spec.name}'; remove tensor and label_tensor")
        if settings.scores == "logits":
            raise ConfigError(f"{where}.scores is logits; the model has `postprocess`: set postprocess.softmax there")
        if settings.top_k > ranking.k:
            raise ConfigError(f"{where}.top_k is {settings.top_k}, but the model's postprocess.top_k is {ranking.k}")
        if settings.labels and len(settings.labels) != ranking.classes:
            raise ConfigError(f"{where}.labels has {len(settings.labels)} names, expected {ranking.classes}")
        self._name, self._at = spec.name, ranking.index
        self._labels, self._top_k = settings.labels, settings.top_k

    def write(self, answer: Answer, decoded: Decoded) -> Any:
        """One object, or a list of them where the request was a list."""
        scores, classes = answer.outputs[self._at], answer.outputs[-1]
        if not np.isfinite(scores).all():
            raise EngineFailed(f"the model's output '{self._name}' has scores that are not finite numbers")
        replies = [self._reply(*row) for row in zip(scores.tolist(), classes.tolist(), strict=True)]
        return replies if decoded.many or len(replies) != 1 else replies[0]

    def _reply(self, scores: list[float], classes: list[int]) -> dict[str, Any]:
        best = zip(scores[: self._top_k or 1], classes, strict=False)
        entries = [_entry(self._labels, number, score) for score, number in best]
        return {**entries[0], "top": entries} if self._top_k else entries[0]


def _entry(labels: Sequence[str], number: int, score: float) -> dict[str, Any]:
    """One class, by its label if it has one, and how likely it is."""
    label = labels[number] if number < len(labels) else number
    return {"prediction": label, "confidence": round(score, _CONFIDENCE_DIGITS)}


def _scores_at(settings: LabelOutput, signature: Signature, where: str) -> int:
    if settings.tensor:
        return _output_at(settings.tensor, signature, f"{where}.tensor")
    found = [number for number, spec in enumerate(signature.outputs) if spec.dtype.kind in "fV" and spec.shape]
    if len(found) != 1:
        raise ConfigError(f"{where}.tensor is missing, and {_listed(signature)} leave open which output has the scores")
    return found[0]


def _label_at(settings: LabelOutput, signature: Signature, where: str) -> int | None:
    if not settings.label_tensor:
        return None
    at = _output_at(settings.label_tensor, signature, f"{where}.label_tensor")
    spec = signature.outputs[at]
    if spec.dtype != tensors.OBJECT and spec.dtype.kind not in "iu":
        raise ConfigError(f"{where}.label_tensor: '{spec.name}' is {spec}, expected texts or whole numbers")
    return at


def _output_at(name: str, signature: Signature, where: str) -> int:
    for number, spec in enumerate(signature.outputs):
        if spec.name == name:
            return number
    raise ConfigError(f"{where} is '{name}', but the model's outputs are {_listed(signature)}")


def _listed(signature: Signature) -> str:
    return ", ".join(f"'{spec.name}' ({spec})" for spec in signature.outputs)
