"""Which models a path stands for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.config import Config
from forno.server.errors import ConfigError
from forno.server.repository import find
from forno.server.repository.folders import stamp_of
from forno.server.versions import natural


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Makes files, named as "PATH=TEXT", and works where they are."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> None:
        for name in names:
            file, _, text = name.partition("=")
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


def found(*paths: str, **config) -> list[str]:
    specs = find([Path(path) for path in paths], Config.model_validate(config))
    return [f"{spec.name} {spec.version} {spec.path}" for spec in specs]


def fault(*paths: str, **config) -> str:
    with pytest.raises(ConfigError) as caught:
        found(*paths, **config)
    return str(caught.value)


def test_a_file_is_a_model(tree):
    tree("a.onnx", "B 2 (final).ONNX", "c.ort")
    assert found("a.onnx") == ["a 1 a.onnx"]
    assert found("B 2 (final).ONNX", "c.ort") == ["B-2-final 1 B 2 (final).ONNX", "c 1 c.ort"]


def test_a_model_folder_without_versions(tree):
    tree("spam/model.onnx", "spam/weights.data", "spam/.hidden.onnx")
    assert found("spam") == ["spam 1 spam/model.onnx"]


def test_the_newest_version_is_served_by_default(tree):
    tree(
        "spam/1/model.onnx",
        "spam/9/model.onnx",
        "spam/10/any.onnx",
        "spam/.11/model.onnx",
        "spam/notes/readme.txt",
    )
    assert found("spam") == ["spam 10 spam/10/any.onnx"]
    assert found("spam", models={"spam": {"versions": 2}}) == [
        "spam 10 spam/10/any.onnx",
        "spam 9 spam/9/model.onnx",
    ]
    assert found("spam", models={"spam": {"versions": [1, 10]}}) == [
        "spam 10 spam/10/any.onnx",
        "spam 1 spam/1/model.onnx",
    ]


def test_a_version_folder_is_that_version_of_the_model_above(tree):
    tree("spam/3/model.onnx", "spam/4/model.onnx")
    assert found("spam/3") == ["spam 3 spam/3/model.onnx"]


def test_a_repository_is_a_folder_of_model_folders(tree):
    tree("repo/b/model.onnx", "repo/a/1/model.onnx", "repo/a/v2/model.onnx", "repo/docs/x.md", "repo/README.md")
    assert found("repo") == ["a 1 repo/a/1/model.onnx", "b 1 repo/b/model.onnx"]


def test_the_working_folder_and_links_keep_their_names(tree, tmp_path, monkeypatch):
    tree("store/x/model.onnx")
    (tmp_path / "spam").symlink_to(tmp_path / "store/x")
    assert found("spam") == ["spam 1 spam/model.onnx"]
    monkeypatch.chdir(tmp_path / "store/x")
    assert found(".") == ["x 1 model.onnx"]


def test_a_model_yaml_is_read_and_the_configuration_wins(tree):
    tree(
        "spam/a/m.onnx",
        "spam/b/m.onnx",
        "spam/model.yaml=versions: [a]\nbatching: {max_rows: 4, max_delay_us: 7}",
    )
    config = Config.model_validate({"models": {"spam": {"batching": {"max_rows": 8}}}})
    (spec,) = find([Path("spam")], config)
    assert (spec.version, spec.settings.batching.max_rows, spec.settings.batching.max_delay_us) == ("a", 8, 7)
    assert found("spam/a") == ["spam a spam/a/m.onnx"]


def test_null_models_need_no_file(tree):
    tree("repo/echo/model.yaml=engine: null")
    assert found(models={"x": {"engine": "null"}}) == ["x 1 None"]
    assert found("repo/echo") == ["echo 1 None"]


def test_models_of_the_configuration_have_the_names_it_gives(tree):
    tree("a.onnx", "b/3/model.onnx", "b/4/model.onnx")
    models = {"one": {"path": "a.onnx"}, "two": {"path": "b"}, "three": {"path": "b/3"}}
    assert found(models=models) == ["one 1 a.onnx", "two 4 b/4/model.onnx", "three 3 b/3/model.onnx"]


@pytest.mark.parametrize(
    ("files", "paths", "config", "expected"),
    [
        (
            [],
            [],
            {},
            (
                "nothing to serve; expected a PATH to "
                "MODEL.onnx, NAME/model.onnx or NAME/VERSION/model.onnx, "
                "to a folder of such, or to a forno.yaml"
            ),
        ),
        ([], ["x.onnx"], {}, "x.onnx: no such file or folder"),
        (
            ["m.pt"],
            ["m.pt"],
            {},
            (
                "m.pt: not a kind of file that is served; expected .onnx, .ort, .plan or .engine, a folder, or a "
                "settings file (.yaml); export it with torch.onnx.export"
            ),
        ),
        (
            ["m.txt"],
            ["m.txt"],
            {},
            (
                "m.txt: not a kind of file that is served; expected .onnx, .ort, .plan or .engine, a folder, or a "
                "settings file (.yaml)"
            ),
        ),
        (
            ["d/x.txt"],
            ["d"],
            {},
            ("d: no model in this folder; looked for MODEL.onnx, NAME/model.onnx or NAME/VERSION/model.onnx"),
        ),
        (
            ["d/x.pt"],
            ["d"],
            {},
            (
                "d: no model in this folder; looked for MODEL.onnx, NAME/model.onnx or "
                "NAME/VERSION/model.onnx. It has .pt: export it with torch.onnx.export"
            ),
        ),
        (
            ["d/forno.yaml"],
            ["d"],
            {},
            (
                "d: no model in this folder; looked for MODEL.onnx, NAME/model.onnx or "
                "NAME/VERSION/model.onnx. To serve what a settings file lists: d/forno.yaml"
            ),
        ),
        (
            ["d/a.onnx", "d/b.onnx"],
            ["d"],
            {},
            (
                "d: holds 2 model files (a.onnx and b.onnx); expected one to a folder. "
                "To serve each under its own name: d/*.onnx"
            ),
        ),
        (
            ["d/m.onnx", "d/1/m.onnx"],
            ["d"],
            {},
            ("d: holds m.onnx and, beside it, versions (1); move the file into a version folder or away"),
        ),
        (
            ["d/1/m.onnx", "d/spam/m.onnx"],
            ["d"],
            {},
            (
                "d: holds models and, beside them, versions (1); expected "
                "MODEL.onnx, NAME/model.onnx or NAME/VERSION/model.onnx"
            ),
        ),
        (
            ["d/my model/m.onnx"],
            ["d"],
            {},
            ("d/my model: model name 'my model' has other characters than letters, digits, '.', '_' and '-'"),
        ),
        (
            ["a/m.onnx", "b/a.onnx"],
            ["a", "b/a.onnx"],
            {},
            (
                "two models are called 'a': a and b/a.onnx; rename one, or "
                "list both with names of your own in a forno.yaml"
            ),
        ),
        (
            ["a.onnx"],
            ["a.onnx", "a.onnx"],
            {},
            (
                "two models are called 'a': a.onnx and a.onnx; rename one, or list both "
                "with names of your own in a forno.yaml"
            ),
        ),
        (
            ["a/1/m.onnx", "a/2/m.onnx"],
            ["a"],
            {"models": {"a": {"versions": ["3"]}}},
            "a: version '3' is not there; there are 2 and 1",
        ),
        (
            ["a/1/m.onnx", "a/2/m.onnx"],
            ["a"],
            {"models": {"a": {"labels": {"stable": "1"}}}},
            "a: label 'stable' is for version '1', which is not served; served are 2 (`versions` says which)",
        ),
        (
            ["spam.onnx"],
            ["spam.onnx"],
            {"models": {"spma": {}}},
            "models.spma: there is no model of this name; did you mean `spam`?",
        ),
        (
            ["spam.onnx"],
            ["spam.onnx"],
            {"models": {"zebra": {}}},
            ("models.zebra: there is no model of this name; give it a `path`, or its folder on the command line"),
        ),
        (
            ["d/a/m.onnx", "d/b/m.onnx"],
            [],
            {"models": {"x": {"path": "d"}}},
            "models.x.path: d holds several models (a and b); expected one",
        ),
        (
            [],
            [],
            {"models": {"a b": {"engine": "null"}}},
            "models.a b: model name 'a b' has other characters than letters, digits, '.', '_' and '-'",
        ),
        (
            ["spam.onnx"],
            ["spam.onnx"],
            {"endpoints": {"e": {"model": "spma"}}},
            "endpoints.e.model: there is no model 'spma'; did you mean `spam`?",
        ),
        (
            ["spam.onnx"],
            ["spam.onnx"],
            {"endpoints": {"e": {"model": "zebra"}}},
            "endpoints.e.model: there is no model 'zebra'; served are spam",
        ),
        (
            ["spam.onnx"],
            ["spam.onnx"],
            {"endpoints": {"e": {"model": "spam", "version": "2"}}},
            "endpoints.e.version: model 'spam' has no version '2'; served are 1",
        ),
        (
            ["spam.onnx"],
            ["spam.onnx"],
            {"endpoints": {"e": {"model": "spam", "label": "x"}}},
            "endpoints.e.label: model 'spam' has no label 'x'; there are none",
        ),
        (
            ["spam/model.yaml=max_rows: 1", "spam/m.onnx"],
            ["spam"],
            {},
            "spam/model.yaml:1: max_rows is not a setting; did you mean `batching.max_rows`?",
        ),
        (
            ["spam/model.yaml="],
            ["spam"],
            {},
            ("spam: no model file in this folder; looked for MODEL.onnx, NAME/model.onnx or NAME/VERSION/model.onnx"),
        ),
    ],
)
def test_what_cannot_be_served_is_explained(tree, files, paths, config, expected):
    tree(*files)
    assert fault(*paths, **config) == expected


def test_a_folder_that_cannot_be_read_is_named(tree, tmp_path):
    tree("d/m.onnx")
    (tmp_path / "d").chmod(0)
    try:
        if os.access("d", os.R_OK):
            pytest.skip("this user may read everything")
        assert fault("d") == "d: cannot be read: Permission denied"
    finally:
        (tmp_path / "d").chmod(0o700)


def test_a_file_has_a_stamp_where_what_is_beside_it_cannot_be_listed(tree, tmp_path, monkeypatch):
    tree("m.onnx=abc", "m.bin=weights")
    both = stamp_of(tmp_path / "m.onnx")
    assert [name for name, *_ in both] == ["m.bin", "m.onnx"]

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))  # it may be entered, not listed

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert stamp_of(tmp_path / "m.onnx") == both[1:]


def test_versions_sort_as_people_read_them():
    ordered = ["v9", "v10", "1.0-rc1", "1.0", "1.0.1", "1.2", "1.10", "2", "10", "2026-01-31"]
    assert sorted(sorted(ordered), key=natural) == ordered


@given(st.lists(st.integers(0, 10**12), unique=True))
def test_numbered_versions_sort_as_numbers(numbers):
    assert sorted(map(str, numbers), key=natural) == [str(number) for number in sorted(numbers)]
