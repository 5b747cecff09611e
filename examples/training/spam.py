"""Trains the spam example and writes it as an ONNX model that takes raw text.

    python examples/training/spam.py

The whole way from text to answer is in the graph, in operators that plain ONNX Runtime has. The first 999
characters, A to Z in lower case, are looked at twice: as words, digits and signs such as `!` and `$`, and as
runs of 1 to 4 characters, which also see `FR33` and parts of words. What occurs
decides, the rarer the more.
"""

from __future__ import annotations

import re
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
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from spam_messages import LABELS, Message, load, split
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = Path(__file__).parents[1] / "models" / "spam" / "1" / "model.onnx"
LONGEST_RUN = 4  # characters
READ_CHARACTERS = 1000  # of the text with a space on either side; RE2 counts no further in a repetition
STRENGTHS = (1.0, 3.0, 10.0, 30.0)  # inverse regularisation; chosen by cross-validation in the training part
FOLDS = 10
WORD = r"[^\W\d_]+|[0-9]|[!?$€£%@/]"
WORD_RE2 = r"[\pL\p{Nl}\p{No}]+|[0-9]|[!?$€£%@/]"  # the same in the notation of the graph's tokenizer
ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def read(text: str) -> str:
    """What the model sees of a text: its beginning, framed by spaces, A to Z in lower case."""
    return f" {text} "[:READ_CHARACTERS].translate(ASCII_LOWER)


def words_of(text: str) -> list[str]:
    """The words, digits and telling signs of a text."""
    return re.findall(WORD, read(text))


def runs_of(text: str) -> list[str]:
    """All runs of 1, then of 2, ... characters of a text."""
    seen = read(text)
    return [seen[i : i + size] for size in range(1, LONGEST_RUN + 1) for i in range(len(seen) - size + 1)]


def pipeline(strength: float = 1.0) -> Pipeline:
    """The model, untrained.

    Args:
        strength: Inverse regularisation of the classifier.

    Returns:
        A scikit-learn pipeline from texts to classes.
    """
    words = TfidfVectorizer(analyzer=words_of, binary=True)
    runs = TfidfVectorizer(analyzer=runs_of, binary=True, min_df=2)
    return make_pipeline(make_union(words, runs), LogisticRegression(C=strength, max_iter=1000))


def constant(name: str, values: Any, dtype: Any) -> onnx.TensorProto:
    """A constant of the graph."""
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def vectorizer_nodes(
    trained: TfidfVectorizer, tokens: str, output: str, longest: int
) -> tuple[list[onnx.NodeProto], list[int]]:
    """The nodes that do to tokens in the graph what a trained vectorizer does.

    Args:
        trained: The vectorizer; its terms are runs of one-character tokens, or, where `longest` is 1, tokens.
        tokens: The input's name.  # [batch, tokens of the longest row], short rows padded with ""
        output: The output's name.  # [batch, terms]
        longest: Tokens of the longest term.

    Returns:
        The nodes, and for each column of their output the vectorizer's own column.
    """
    # The operator wants its pool in order of length; the place in the pool becomes the column.
    pool = sorted(trained.vocabulary_, key=lambda term: (len(term) if longest > 1 else 1, term))
    columns = [int(trained.vocabulary_[term]) for term in pool]
    spelled = [list(term) if longest > 1 else [term] for term in pool]
    starts = [sum(len(term) for term in spelled if len(term) < size) for size in range(1, longest + 1)]
    # "" is in no term, so what pads short rows counts for nothing.
    occurrences = helper.make_node(
        "TfIdfVectorizer",
        [tokens],
        [f"{output}_occurs"],
        mode="IDF",
        min_gram_length=1,
        max_gram_length=longest,
        max_skip_count=0,
        pool_strings=[token for term in spelled for token in term],
        ngram_counts=starts,
        ngram_indexes=list(range(len(pool))),
        weights=[float(weight) for weight in trained.idf_[columns]],
    )
    return [
        occurrences,
        helper.make_node("LpNormalization", [f"{output}_occurs"], [output], axis=1, p=2),
    ], columns


def graph_of(trained: Pipeline) -> onnx.ModelProto:
    """The trained pipeline as an ONNX model from `text` to `probabilities` and `label`.

    Args:
        trained: What `pipeline` made, fitted.

    Returns:
        A checked model.
    """
    (_, words), (_, runs) = trained[0].transformer_list
    classifier = trained[-1]
    word_nodes, word_columns = vectorizer_nodes(words, "words", "word_features", longest=1)
    run_nodes, run_columns = vectorizer_nodes(runs, "characters", "run_features", longest=LONGEST_RUN)
    columns = [*word_columns, *(len(word_columns) + column for column in run_columns)]
    # One score and its opposite: their softmax is the classifier's logistic function.
    coefficients = np.outer(classifier.coef_[0][columns], [-0.5, 0.5])
    initializers = [
        constant("space", " ", object),
        constant("names", LABELS, object),
        constant("first", 0, np.int64),
        constant("weights", coefficients, np.float32),
        constant("bias", classifier.intercept_[0] * np.array([-0.5, 0.5]), np.float32),
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
        helper.make_node("Tokenizer", ["lower"], ["words"], tokenexp=WORD_RE2, **tokenizer),
        *word_nodes,
        helper.make_node("Tokenizer", ["lower"], ["characters"], separators=[""], **tokenizer),
        *run_nodes,
        helper.make_node("Concat", ["word_features", "run_features"], ["features"], axis=1),
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
    words, runs = (len(part.vocabulary_) for _, part in trained[0].transformer_list)
    print(f"trained on {len(training)}: {words} words, {runs} runs of characters, strength {strength:g}")
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
