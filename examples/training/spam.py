"""Trains the spam example and writes it as an ONNX model that takes raw text.

    python examples/training/spam.py

The whole way from text to answer is in the graph, in operators that plain ONNX Runtime has. The first 999
characters, A to Z in lower case, are cut into runs of 1 to 4 characters. Which of the known runs occur, weighted
by how rare they are, decides. Runs of characters rather than words: they need no rule for what a word is.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from spam_messages import LABELS, Message, load, split
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = Path(__file__).parents[1] / "models" / "spam" / "1" / "model.onnx"
LONGEST_RUN = 4  # characters
READ_CHARACTERS = 1000  # of the text with a space on either side; RE2 counts no further in a repetition
STRENGTHS = (1.0, 3.0, 10.0, 30.0)  # inverse regularisation; chosen by cross-validation in the training part
FOLDS = 10
ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def runs_of(text: str) -> list[str]:
    """All runs of characters of a text: what the graph's tokenizer and n-gram operator see.

    Args:
        text: Any text.

    Returns:
        Runs of 1, then of 2, ... characters.
    """
    seen = f" {text} "[:READ_CHARACTERS].translate(ASCII_LOWER)
    return [seen[i : i + size] for size in range(1, LONGEST_RUN + 1) for i in range(len(seen) - size + 1)]


def pipeline(strength: float = 1.0) -> Pipeline:
    """The model, untrained.

    Args:
        strength: Inverse regularisation of the classifier.

    Returns:
        A scikit-learn pipeline from texts to classes.
    """
    return make_pipeline(
        TfidfVectorizer(analyzer=runs_of, binary=True, min_df=2, dtype=np.float64),
        LogisticRegression(C=strength, max_iter=1000),
    )


def graph_of(trained: Pipeline) -> onnx.ModelProto:
    """The trained pipeline as an ONNX model from `text` to `probabilities` and `label`.

    Args:
        trained: What `pipeline` made, fitted.

    Returns:
        A checked model.
    """
    vectorizer, classifier = trained[0], trained[-1]
    # The operator wants its pool sorted by length of run; the position in the pool becomes the column.
    pool = sorted(vectorizer.vocabulary_, key=lambda run: (len(run), run))
    columns = [vectorizer.vocabulary_[run] for run in pool]
    starts = [sum(len(run) < size for run in pool) for size in range(1, LONGEST_RUN + 1)]
    # One token is one character, so a pool entry of a run of n is n tokens.
    characters = [character for run in pool for character in run]
    starts = [sum(len(run) for run in pool[:start]) for start in starts]
    coefficients = classifier.coef_[0][columns]

    def constant(name: str, values: Any, dtype: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(values, dtype), name)

    initializers = [
        constant("space", " ", object),
        constant("names", LABELS, object),
        constant("first", 0, np.int64),
        constant("weights", np.stack([-coefficients, coefficients], axis=1) / 2, np.float32),
        constant("bias", np.array([-1, 1]) * classifier.intercept_[0] / 2, np.float32),
    ]
    tokenizer: dict[str, Any] = {"domain": "com.microsoft", "mark": 0, "pad_value": "", "mincharnum": 1}
    beginning = f"(?s).{{1,{READ_CHARACTERS}}}"
    nodes = [
        helper.make_node("StringConcat", ["space", "text"], ["opened"]),
        helper.make_node("StringConcat", ["opened", "space"], ["framed"]),
        # One very long text would otherwise pad every row of its batch to its length.
        helper.make_node("Tokenizer", ["framed"], ["pieces"], tokenexp=beginning, **tokenizer),
        helper.make_node("Gather", ["pieces", "first"], ["read"], axis=1),
        # Locale C is on every machine; it lowers ASCII letters only.
        helper.make_node("StringNormalizer", ["read"], ["lower"], case_change_action="LOWER", locale="C"),
        helper.make_node("Tokenizer", ["lower"], ["characters"], separators=[""], **tokenizer),
        # The empty string that pads short rows is in no run of the pool: it counts for nothing.
        helper.make_node(
            "TfIdfVectorizer",
            ["characters"],
            ["occurs"],
            mode="IDF",
            min_gram_length=1,
            max_gram_length=LONGEST_RUN,
            max_skip_count=0,
            pool_strings=characters,
            ngram_counts=starts,
            ngram_indexes=list(range(len(pool))),
            weights=[float(weight) for weight in vectorizer.idf_[columns]],
        ),
        helper.make_node("LpNormalization", ["occurs"], ["features"], axis=1, p=2),
        helper.make_node("Gemm", ["features", "weights", "bias"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["names", "best"], ["label"]),
    ]
    graph = helper.make_graph(
        nodes,
        "spam",
        [helper.make_tensor_value_info("text", TensorProto.STRING, ["batch"])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(LABELS)]),
            helper.make_tensor_value_info("label", TensorProto.STRING, ["batch"]),
        ],
        initializers,
    )
    model = helper.make_model(
        graph,
        producer_name="forno-examples",
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        doc_string="Spam or ham. Reads the first 999 characters.",
    )
    onnx.checker.check_model(model)
    return model


def texts_of(messages: Sequence[Message]) -> np.ndarray[Any, Any]:
    """The texts of messages as ONNX Runtime takes them."""
    return np.array([message.text for message in messages], dtype=object)


def main() -> None:
    """Trains, measures, writes, and checks that what was written answers like what was trained."""
    messages = load()
    training, held_out = split(messages)
    labels = [message.label for message in training]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    search = GridSearchCV(pipeline(), {"logisticregression__C": STRENGTHS}, cv=folds)
    strength = search.fit(texts_of(training), labels).best_params_["logisticregression__C"]
    trained = pipeline(strength).fit(texts_of(training), labels)

    spam_count = sum(message.label == "spam" for message in messages)
    print(f"{len(messages)} messages: {spam_count} spam, {len(messages) - spam_count} ham")
    run_count = len(trained[0].vocabulary_)
    print(f"trained on {len(training)}: {run_count} runs of characters, strength {strength:g}")
    hits = int(np.sum(trained.predict(texts_of(held_out)) == [message.label for message in held_out]))
    print(f"held-out accuracy: {hits / len(held_out):.3f} ({hits} of {len(held_out)})")
    scores = cross_val_score(pipeline(strength), texts_of(messages), [m.label for m in messages], cv=folds)
    spread = f"folds {scores.min():.3f} to {scores.max():.3f}"
    print(f"{FOLDS}-fold cross-validation over all messages: {scores.mean():.3f} ({spread})")

    model = graph_of(trained)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    MODEL.write_bytes(model.SerializeToString(deterministic=True))
    session = ort.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    served = session.run(["probabilities"], {"text": texts_of(messages)})[0]
    difference = float(np.abs(served - trained.predict_proba(texts_of(messages))).max())
    if difference > 1e-5:
        raise SystemExit(f"the graph and the trained model differ by {difference:.1e}, expected at most 1e-5")
    print(f"wrote {MODEL.name}, {MODEL.stat().st_size:,} bytes; as trained, to within {difference:.1e}")


if __name__ == "__main__":
    # Sums taken by several threads may differ in their last bit from one run to the next.
    with threadpool_limits(limits=1):
        main()
