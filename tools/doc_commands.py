"""The commands that the documentation shows, so that a test can run them.

A ```console block holds commands behind "$ ", continued behind "> ", and between them what they print.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command as a document shows it."""

    document: Path  # relative to the repository
    line: int  # of the command, counted from 1
    text: str  # as a shell takes it, continuation lines included
    output: str  # what the document says it prints; may be abridged with "..."

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """All documents that may show commands."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def commands(document: Path) -> list[Command]:
    """The commands of one document, in order.

    Raises:
        ValueError: A block shows output before any command.
    """
    text = document.read_text()
    found: list[Command] = []
    for block in BLOCK.finditer(text):
        start = text.count("\n", 0, block.start()) + 2
        found.extend(_commands_of_block(document.relative_to(ROOT), start, block[1].splitlines()))
    return found


def _commands_of_block(document: Path, start: int, lines: list[str]) -> list[Command]:
    parts: list[tuple[int, list[str], list[str]]] = []
    for number, line in enumerate(lines, start):
        if line.startswith("$ "):
            parts.append((number, [line[2:]], []))
        elif not parts:
            raise ValueError(f"{document}:{number}: a console block begins with '$ ', this one with '{line}'")
        elif line.startswith("> ") and not parts[-1][2]:
            parts[-1][1].append(line[2:])
        else:
            parts[-1][2].append(line)
    return [Command(document, number, "\n".join(typed), "\n".join(printed)) for number, typed, printed in parts]
