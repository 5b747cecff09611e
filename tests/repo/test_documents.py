"""The documents speak of what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import doc_commands

SERVER = Path("server/forno/server")
# A path in backticks: lower case, at least one slash or a suffix that files here have; not a URL's path.
NAMED = re.compile(r"`([a-z_][a-z0-9_./-]*(?:/|/[a-z0-9_.-]+|\.(?:py|md|toml|yaml|proto|cc)))`")
LINKED = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)(?:#[^)]*)?\)")


def test_changelog_has_a_place_for_the_next_change(root: Path) -> None:
    assert "\n## Unreleased\n" in (root / "CHANGELOG.md").read_text()


def test_architecture_names_every_part_of_the_server(root: Path) -> None:
    text = (root / "ARCHITECTURE.md").read_text()
    parts = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in sorted((root / SERVER).iterdir())
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").is_file()
    ]
    assert [part for part in parts if f"`{part}`" not in text] == []


def test_architecture_names_nothing_that_is_not_there(root: Path, files: list[Path]) -> None:
    # By what belongs to the repository: an empty folder is not in anyone's clone.
    there = {path for file in files for path in (file, *file.parents)}
    named = NAMED.findall((root / "ARCHITECTURE.md").read_text())
    assert [name for name in named if not {root / name, root / SERVER / name} & there] == []


def test_links_between_documents_lead_somewhere(root: Path) -> None:
    broken = [
        f"{document.relative_to(root)}: {link}"
        for document in doc_commands.documents()
        for link in LINKED.findall(document.read_text())
        if not (document.parent / link).exists()
    ]
    assert broken == []


def test_console_blocks_can_be_read() -> None:
    shown = [command for document in doc_commands.documents() for command in doc_commands.commands(document)]
    assert {"make run", "make test"} <= {command.text for command in shown}


def test_readme_opens_with_the_two_commands(root: Path) -> None:
    first = doc_commands.commands(root / "README.md")[:2]
    assert [command.text for command in first] == ["make run", "make test"]


def test_every_result_says_which_command_gave_it(files: list[Path], root: Path) -> None:
    results = [path for path in files if path.is_relative_to(root / "bench" / "results") and path.suffix == ".json"]
    assert len(results) > 10
    assert [path.name for path in results if not json.loads(path.read_text()).get("command")] == []
