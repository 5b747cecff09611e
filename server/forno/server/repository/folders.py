"""Reads folders: what is a model, what a version, what a repository."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from forno.server.errors import ConfigError
from forno.server.spelling import listed
from forno.server.versions import natural

MODEL_SUFFIXES = (".onnx", ".ort", ".plan", ".engine")
SETTINGS_FILE = "model.yaml"
ONLY_VERSION = "1"
LAYOUT = "MODEL.onnx, NAME/model.onnx or NAME/VERSION/model.onnx"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_VERSION = re.compile(r"v?\d+([._-][A-Za-z0-9._-]*)?")  # 3, v3, 1.0.2, 2026-01-31
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_ADVICE = {
    ".pt": "export it with torch.onnx.export",
    ".pth": "export it with torch.onnx.export",
    ".safetensors": "weights alone are no model; export it with torch.onnx.export or optimum",
    ".pb": "convert it with tf2onnx",
    ".h5": "convert it with tf2onnx",
    ".keras": "convert it with tf2onnx",
    ".tflite": "convert it with tf2onnx",
    ".pkl": "convert it with skl2onnx",
    ".joblib": "convert it with skl2onnx",
}


@dataclass(frozen=True)
class Found:
    """A model as it lies on disk."""

    name: str
    place: str  # what a message calls it: its path, or the setting that says it
    files: dict[str, Path] = field(default_factory=dict)  # version -> file, newest first
    settings_file: Path | None = None


def look(path: Path) -> list[Found]:
    """The models at a path: one, or those of a repository by name.

    Raises:
        ConfigError: There is none, or it cannot be told which file is meant.
    """
    try:
        if path.is_dir():
            return _look_in(path)
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
        return [Found(_name_of_file(path), str(path), {ONLY_VERSION: path})]
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def check_name(name: str, place: Path | str, what: str = "model") -> str:
    """The name, which must be fit for a URL as it is.

    Raises:
        ConfigError: It has other characters.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{place}: {what} name {name!r} has other characters than letters, digits, '.', '_' and '-'")
    return name


def stamp_of(file: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells a model's file from another that takes its place: name, time, size and number of each.

    A model may keep its weights in files beside it, so these count too, but not other models.
    """
    try:
        beside = [path for path in _visible(file.parent) if path.suffix.lower() not in MODEL_SUFFIXES]
    except OSError:
        beside = []  # its folder may be entered but not listed, or is gone meanwhile
    stamps = []
    for path in sorted({file, *beside}):
        try:
            status = path.stat()
        except OSError:
            continue  # a link to nowhere, or gone meanwhile
        if stat.S_ISREG(status.st_mode):
            stamps.append((path.name, status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(stamps)


def _look_in(folder: Path) -> list[Found]:
    files = _model_files(folder)
    if files:
        return [_version_folder(folder, files)]
    if (folder / SETTINGS_FILE).is_file():
        return [_model_folder(folder)]
    held = {child: depth for child in _folders(folder) if (depth := _depth(child))}
    versions = [child for child in held if held[child] == 1 and _VERSION.fullmatch(child.name)]
    if held and len(versions) == len(held):
        return [_model_folder(folder)]
    if versions:
        names = listed([child.name for child in versions])
        raise ConfigError(f"{folder}: holds models and, beside them, versions ({names}); expected {LAYOUT}")
    if not held:
        raise ConfigError(_nothing_in(folder))
    return [_model_folder(child) for child in sorted(held)]


def _depth(folder: Path) -> int:
    """How far below the folder its nearest model file lies: 1 = in it, 0 = nowhere. Settings count as 2."""
    if _model_files(folder):
        return 1
    below = any(_model_files(child) for child in _folders(folder))
    return 2 if below or (folder / SETTINGS_FILE).is_file() else 0


def _version_folder(folder: Path, files: list[Path]) -> Found:
    """A folder with a model file in it: one version of the model above it, or a model without versions."""
    absolute = _absolute(folder)
    above = absolute.parent
    is_version = bool(_VERSION.fullmatch(absolute.name)) or (above / SETTINGS_FILE).is_file()
    if not is_version:
        return _model_folder(folder)
    name = check_name(above.name, folder)
    return Found(name, str(folder), {absolute.name: _only(folder, files)}, _settings_file(above))


def _model_folder(folder: Path) -> Found:
    name = check_name(_absolute(folder).name, folder)
    settings = _settings_file(folder)
    files = _model_files(folder)
    versions = {child.name: found for child in _folders(folder) if (found := _model_files(child))}
    if files and versions:
        raise ConfigError(
            f"{folder}: holds {files[0].name} and, beside it, versions ({listed([*versions])}); "
            "move the file into a version folder or away"
        )
    if files:
        return Found(name, str(folder), {ONLY_VERSION: _only(folder, files)}, settings)
    newest_first = sorted(versions, key=lambda version: (natural(version), version), reverse=True)
    return Found(
        name,
        str(folder),
        {
            check_name(version, folder, "version"): _only(folder / version, versions[version])
            for version in newest_first
        },
        settings,
    )


def _only(folder: Path, files: list[Path]) -> Path:
    if len(files) > 1:
        names = listed([file.name for file in files])
        raise ConfigError(
            f"{folder}: holds {len(files)} model files ({names}); expected one to a folder. "
            f"To serve each under its own name: {folder}/*{files[0].suffix}"
        )
    return files[0]


def _name_of_file(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix not in MODEL_SUFFIXES:
        advice = _ADVICE.get(suffix)
        raise ConfigError(
            f"{file}: not a kind of file that is served; "
            f"expected {listed(MODEL_SUFFIXES, 'or')}, a folder, or a settings file (.yaml)"
            + (f"; {advice}" if advice else "")
        )
    name = _NOT_IN_NAMES.sub("-", file.stem).strip("-.")
    return check_name(name, file)


def _model_files(folder: Path) -> list[Path]:
    return sorted(child for child in _visible(folder) if child.suffix.lower() in MODEL_SUFFIXES and not child.is_dir())


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in _visible(folder) if child.is_dir())


def _visible(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if not child.name.startswith(".")]


def _settings_file(folder: Path) -> Path | None:
    file = folder / SETTINGS_FILE
    return file if file.is_file() else None


def _absolute(folder: Path) -> Path:
    """The folder with its name, also for "." and "x/.."; links keep the name they have here."""
    return Path(os.path.abspath(folder))  # noqa: PTH100  (Path.resolve would follow links)


def _nothing_in(folder: Path) -> str:
    text = f"{folder}: no model in this folder; looked for {LAYOUT}"
    settings = [child.name for child in _visible(folder) if child.suffix in (".yaml", ".yml")]
    if settings:
        return f"{text}. To serve what a settings file lists: {folder / min(settings)}"
    others = sorted({child.suffix for child in _visible(folder) if child.suffix in _ADVICE})
    return f"{text}. It has {listed(others)}: {_ADVICE[others[0]]}" if others else text
