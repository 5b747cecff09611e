"""What Envoy answers by itself fits what the contract says."""

from __future__ import annotations

import re

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from forno.server.transport.envoy.bootstrap import DESCRIPTORS
from forno.server.transport.envoy.replies import METHODS


def test_each_path_takes_the_methods_of_the_contract():
    """Those of all its bindings, but that every path below /v1/ may be an endpoint's, which is called by POST."""
    files = FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file
    options = [method.options for file in files for service in file.service for method in service.method]
    rules = [one.Extensions[annotations_pb2.http] for one in options if one.HasExtension(annotations_pb2.http)]
    taken: dict[str, set[str]] = {}
    for binding in [each for rule in rules for each in (rule, *rule.additional_bindings)]:
        kind = binding.WhichOneof("pattern")
        method, path = (
            (binding.custom.kind, binding.custom.path) if kind == "custom" else (kind.upper(), getattr(binding, kind))
        )
        taken.setdefault(path.replace("{endpoint=**}", "a/b"), set()).add(method)
    assert len(taken) > 10
    for path, methods in taken.items():
        some = re.sub(r"\{\w+\}", "some-name.2", path)
        assert methods == set(next(told for known, told in METHODS.items() if re.fullmatch(known, some))), path
