"""The spam example's messages and how they are parted; without dependencies, for the tests' sake."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

LABELS = ("ham", "spam")
FILE = Path(__file__).with_name("spam_messages.tsv")
HELD_OUT_SHARE = 0.25
SEED = 20


class Message(NamedTuple):
    """One message and what it is."""

    label: str  # of LABELS
    text: str


def load(path: Path = FILE) -> list[Message]:
    """Reads a file of LABEL<TAB>TEXT lines.

    Args:
        path: The file.

    Returns:
        Its messages, in the order of the file.

    Raises:
        ValueError: A line has no tab, or another label than `ham` or `spam`.
    """
    messages = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        label, tab, text = line.partition("\t")
        if not tab or label not in LABELS:
            raise ValueError(f"{path.name}:{number}: {line[:40]!r}, expected 'ham' or 'spam', a tab, the text")
        messages.append(Message(label, text))
    return messages


def split(messages: list[Message], seed: int = SEED) -> tuple[list[Message], list[Message]]:
    """Parts messages so that both parts have the same share of spam.

    Args:
        messages: All messages.
        seed: Decides which message goes where.

    Returns:
        The training part and the held-out part.
    """
    training: list[Message] = []
    held_out: list[Message] = []
    for label in LABELS:
        group = [message for message in messages if message.label == label]
        random.Random(seed).shuffle(group)  # noqa: S311 (a split, not a secret)
        count = round(len(group) * HELD_OUT_SHARE)
        held_out += group[:count]
        training += group[count:]
    return training, held_out
