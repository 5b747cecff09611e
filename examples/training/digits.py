"""Trains the digits example, writes it as an ONNX model, and the held-out images beside it.

    python examples/training/digits.py

Images are 8 x 8, light on dark, 0 to 16. One whose border is bright is taken to be dark on light and is
turned over inside the graph, so that a scan of ink on paper works as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Array = np.ndarray[Any, Any]

EXAMPLES = Path(__file__).parents[1]
MODEL = EXAMPLES / "models" / "digits" / "1" / "model.onnx"
DATA = EXAMPLES / "data"
DIGITS = 10
PIXELS = 8  # on a side
BRIGHTEST = 16
MAGNIFICATION = 8  # of the PNG files
SEED = 20
FOLDS = 10
# Of the kernel; width and ridge were chosen by cross-validation within the training part.
WIDTH = 0.3 / BRIGHTEST**2
RIDGE = 0.1
SCALES = tuple(range(2, 31))


@dataclass(frozen=True)
class Classifier:
    """Kernel ridge regression onto the ten digits: every known image votes, by its nearness."""

    known: Array  # [images, 64], 0..16
    votes: Array  # [images, 10]
    scale: float  # makes probabilities of votes, by softmax


def train(pixels: Array, labels: Array) -> Classifier:
    """Solves for the votes, and takes the scale whose left-one-out probabilities are the likeliest.

    Args:
        pixels: Images.  # [images, 8, 8], 0..16
        labels: Their digits.

    Returns:
        The trained classifier.
    """
    known = pixels.reshape(len(pixels), -1).astype(np.float64)
    truth = np.eye(DIGITS)[labels]
    inverse = np.linalg.inv(nearness(known, known) + RIDGE * np.eye(len(known)))
    votes = inverse @ truth
    left_out = truth - votes / np.diag(inverse)[:, None]  # what each image would get had it not been there
    surprise = [-np.mean(np.sum(truth * log_softmax(scale * left_out), axis=1)) for scale in SCALES]
    return Classifier(known, votes, SCALES[int(np.argmin(surprise))])


def nearness(rows: Array, known: Array) -> Array:
    """The Gaussian kernel of every row with every known image."""
    squared = np.sum(rows**2, axis=1)[:, None] + np.sum(known**2, axis=1) - 2 * rows @ known.T
    return np.asarray(np.exp(-WIDTH * squared))


def log_softmax(scores: Array) -> Array:
    """Logarithms of the softmax of every row; scores are small, nothing overflows."""
    return np.asarray(scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True)))


def accuracy(model: onnx.ModelProto, pixels: Array, labels: Array) -> float:
    """The share of images whose digit the ONNX model names."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return float(np.mean(session.run(["label"], {"pixels": pixels})[0] == labels))


def graph_of(trained: Classifier) -> onnx.ModelProto:
    """The trained classifier as an ONNX model from `pixels` to `probabilities` and `label`.

    Args:
        trained: What `train` made.

    Returns:
        A checked model.
    """
    border = np.zeros((PIXELS, PIXELS))
    border[[0, -1], :] = border[:, [0, -1]] = 1
    constants: dict[str, tuple[Any, Any]] = {
        "row": ([0, -1], np.int64),
        "across": ([1], np.int64),
        "border": (border.reshape(-1, 1) / border.sum(), np.float32),
        "half": (BRIGHTEST / 2, np.float32),
        "brightest": (BRIGHTEST, np.float32),
        "known_bytes": (trained.known, np.uint8),  # whole numbers: a quarter of the file
        "known_squares": (np.sum(trained.known**2, axis=1), np.float32),
        "width": (-WIDTH, np.float32),
        "votes": (trained.votes * trained.scale, np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["pixels", "row"], ["flat"]),
        helper.make_node("MatMul", ["flat", "border"], ["brightness"]),
        helper.make_node("Greater", ["brightness", "half"], ["on_light"]),
        helper.make_node("Sub", ["brightest", "flat"], ["inverse"]),
        helper.make_node("Where", ["on_light", "inverse", "flat"], ["on_dark"]),
        helper.make_node("Cast", ["known_bytes"], ["known"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["on_dark", "known", "known_squares"], ["halfway"], alpha=-2.0, transB=1),
        helper.make_node("ReduceSumSquare", ["on_dark", "across"], ["squares"], keepdims=1),
        helper.make_node("Add", ["halfway", "squares"], ["distance"]),
        helper.make_node("Mul", ["distance", "width"], ["exponent"]),
        helper.make_node("Exp", ["exponent"], ["nearness"]),
        helper.make_node("MatMul", ["nearness", "votes"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", PIXELS, PIXELS])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", DIGITS]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(np.asarray(array, dtype), name) for name, (array, dtype) in constants.items()],
    )
    model = helper.make_model(
        graph,
        producer_name="forno-examples",
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20)],
        doc_string="A handwritten digit. Pixels are 0 to 16.",
    )
    onnx.checker.check_model(model)
    return model


def write_images(pixels: Array, labels: Array) -> None:
    """Writes the first held-out image of each digit as a magnified PNG, and a `7` in dark on light beside it.

    Args:
        pixels: Held-out images.  # [rows, 8, 8], 0..16
        labels: Their digits.
    """
    for digit in range(DIGITS):
        grey = np.rint(pixels[np.argmax(labels == digit)] * 255 / BRIGHTEST).astype(np.uint8)
        large = grey.repeat(MAGNIFICATION, axis=0).repeat(MAGNIFICATION, axis=1)
        Image.fromarray(large).save(DATA / f"digit-{digit}.png", optimize=True)
        if digit == 7:
            Image.fromarray(255 - large).save(DATA / f"digit-{digit}-dark-on-light.png", optimize=True)


def main() -> None:
    """Trains, measures and writes."""
    digits = load_digits()
    images = digits.images.astype(np.float32)
    pixels, held_pixels, labels, held_labels = train_test_split(
        images, digits.target, test_size=0.25, random_state=SEED, stratify=digits.target
    )
    trained = train(pixels, labels)
    print(f"trained on {len(labels)} images, scale {trained.scale}")

    model = graph_of(trained)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    MODEL.write_bytes(model.SerializeToString(deterministic=True))
    share = accuracy(model, held_pixels, held_labels)
    hits = round(share * len(held_labels))
    print(f"held-out accuracy of the ONNX model: {share:.3f} ({hits} of {len(held_labels)})")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(images, digits.target)
    scores = [
        accuracy(graph_of(train(images[some], digits.target[some])), images[rest], digits.target[rest])
        for some, rest in folds
    ]
    spread = f"folds {min(scores):.3f} to {max(scores):.3f}"
    print(f"{FOLDS}-fold cross-validation over all images: {np.mean(scores):.3f} ({spread})")

    DATA.mkdir(exist_ok=True)
    np.savez_compressed(
        DATA / "digits-held-out.npz", pixels=held_pixels.astype(np.uint8), labels=held_labels.astype(np.uint8)
    )
    write_images(held_pixels, held_labels)
    print(f"wrote {MODEL.name}, {MODEL.stat().st_size:,} bytes, and the held-out images")


if __name__ == "__main__":
    # Sums taken by several threads may differ in their last bit from one run to the next.
    with threadpool_limits(limits=1):
        main()
