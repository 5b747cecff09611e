"""The demo models are as good as examples/README.md says, and a row's answer is its own."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import yaml
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = sorted((EXAMPLES / "data").glob("digit-*.png"))
STRANGE_TEXTS = [
    "",
    " ",
    "\0",
    "\n\t",
    "🎉",
    "👩‍👩‍👧 ok",
    "Grüße ÄÖÜ",
    "同じ",
    "FREE!!!",
    "free",
    "win " * 5000,
]
FEW_BYTES = 500_000


def session_of(name):
    path = EXAMPLES / "models" / name / "1" / "model.onnx"
    assert path.stat().st_size < FEW_BYTES
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def digits():
    return session_of("digits")


@pytest.fixture(scope="module")
def spam():
    return session_of("spam")


@pytest.fixture(scope="module")
def messages():
    script = runpy.run_path(str(EXAMPLES / "training" / "spam_messages.py"))
    training, held_out = script["split"](script["load"]())
    return training, held_out


@pytest.fixture(scope="module")
def images():
    with np.load(EXAMPLES / "data" / "digits-held-out.npz") as stored:
        return stored["pixels"].astype(np.float32), stored["labels"]


def probabilities(session, rows):
    (name,) = (spec.name for spec in session.get_inputs())
    return session.run(["probabilities"], {name: rows})[0]


def texts(values):
    return np.array(list(values), dtype=object)


def assert_rows_are_independent(session, rows):
    together = probabilities(session, rows)
    alone = np.concatenate([probabilities(session, rows[i : i + 1]) for i in range(len(rows))])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)


def test_signatures_are_as_documented(digits, spam):
    def described(specs):
        return [(spec.name, spec.type, spec.shape) for spec in specs]

    assert described(digits.get_inputs()) == [("pixels", "tensor(float)", ["batch", 8, 8])]
    assert described(digits.get_outputs()) == [
        ("probabilities", "tensor(float)", ["batch", 10]),
        ("label", "tensor(int64)", ["batch"]),
    ]
    assert described(spam.get_inputs()) == [("text", "tensor(string)", ["batch"])]
    assert described(spam.get_outputs()) == [
        ("probabilities", "tensor(float)", ["batch", 2]),
        ("label", "tensor(string)", ["batch"]),
    ]


def test_digits_are_as_accurate_as_stated(digits, images):
    pixels, labels = images
    assert len(labels) == 450
    assert np.sum(digits.run(["label"], {"pixels": pixels})[0] == labels) >= 445


def test_digits_dark_on_light_are_read_as_well(digits, images):
    pixels, _ = images
    np.testing.assert_allclose(probabilities(digits, 16 - pixels), probabilities(digits, pixels), atol=1e-6)


def test_digits_rows_are_independent(digits, images):
    assert_rows_are_independent(digits, images[0][:32])


def test_a_picture_of_every_digit_is_shipped():
    assert {path.stem[len("digit-")] for path in IMAGES} == set("0123456789")


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_shipped_pictures_are_recognised(digits, path):
    with Image.open(path) as picture:
        small = picture.convert("L").resize((8, 8), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float32)[np.newaxis] * np.float32(16 / 255)
    found = probabilities(digits, pixels)[0]
    assert np.argmax(found) == int(path.stem[len("digit-")])
    assert found.max() > 0.9


def test_spam_is_as_accurate_as_stated(spam, messages):
    _, held_out = messages
    assert len(held_out) == 211
    found = spam.run(["label"], {"text": texts(message.text for message in held_out)})[0]
    assert np.sum(found == [message.label for message in held_out]) >= 187


def test_no_held_out_message_was_trained_on(messages):
    training, held_out = messages

    def essence(message):
        return "".join(filter(str.isalnum, message.text.lower())) or message.text

    assert not {essence(message) for message in training} & {essence(message) for message in held_out}
    assert len({essence(message) for message in training + held_out}) == len(training + held_out)


def test_spam_label_is_the_likelier_one(spam, messages):
    found, labels = spam.run(["probabilities", "label"], {"text": texts(m.text for m in messages[0][:64])})
    assert labels.tolist() == [("ham", "spam")[best] for best in found.argmax(axis=1)]


def test_spam_rows_are_independent_of_each_other(spam, messages):
    _, held_out = messages
    ordinary = [message.text for message in held_out[: 32 - len(STRANGE_TEXTS)]]
    assert_rows_are_independent(spam, texts([*ordinary, *STRANGE_TEXTS]))


@pytest.mark.parametrize("text", STRANGE_TEXTS, ids=lambda text: repr(text[:8]))
def test_spam_answers_any_text(spam, text):
    assert np.isfinite(probabilities(spam, texts([text]))).all()


def test_spam_reads_the_first_999_characters_only(spam):
    start = "Lunch at noon? " * 70
    read = probabilities(spam, texts([start[:999], start[:999] + "You won a free prize!", start[:998] + "!"]))
    assert read[0].tolist() == read[1].tolist() != read[2].tolist()


def test_spam_case_of_ascii_letters_does_not_matter(spam):
    found = probabilities(spam, texts(["CLICK to WIN a Free Prize", "click to win a free prize"]))
    assert found[0].tolist() == found[1].tolist()
    assert found[0][1] > 0.9


def test_forno_yaml_names_what_is_there():
    demo = yaml.safe_load((EXAMPLES / "forno.yaml").read_text())
    assert [name for name, model in demo["models"].items() if not (EXAMPLES / model["path"]).is_dir()] == []
    assert {endpoint["model"] for endpoint in demo["endpoints"].values()} <= set(demo["models"])
    assert demo["endpoints"]["digits/classify"]["output"]["labels"] == [str(digit) for digit in range(10)]
    assert demo["endpoints"]["spam/detect"]["output"]["labels"] == ["ham", "spam"]
