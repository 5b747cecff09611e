"""From paths and settings to the models that are to be served. Knows files, nothing of running.

    FILE.onnx                              a model called FILE, version "1"
    NAME/model.onnx                        a model folder without versions; the version is "1"
    NAME/VERSION/model.onnx                a model folder with versions; NAME/model.yaml may hold its settings
    FOLDER/NAME/...                        a repository: a folder of model folders

Any single `*.onnx` stands for `model.onnx`. Hidden files and folders without a model in them are passed over.
"""

from __future__ import annotations

from forno.server.repository.specs import ModelSpec, find

__all__ = ["ModelSpec", "find"]
