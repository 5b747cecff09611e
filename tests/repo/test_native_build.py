"""The native module is built where it can be, and never stands in the way where it cannot."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import build_native
import pytest


def test_no_reason_not_to_build_where_headers_and_sources_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(build_native.SKIP, raising=False)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    assert (build_native.obstacle() == "") == headers.is_file()


def test_it_can_be_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build_native.SKIP, "skip")
    assert build_native.build() == "native Envoy module skipped: FORNO_NATIVE=skip is set"


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(build_native.SKIP, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert f"Python.h is not in {tmp_path}" in build_native.build()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module(monkeypatch, tmp_path, "int answer() { return 42; }")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert "no C++ compiler" in build_native.build()


@pytest.mark.skipif(not build_native.system_compiler(), reason="no C++ compiler")
class TestWithACompiler:
    def test_it_is_built_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        target = module(monkeypatch, tmp_path, '#include <Python.h>\nextern "C" int answer() { return 42; }')
        assert "built with" in build_native.build()
        assert target.is_file()
        assert build_native.build() == "native Envoy module is current"

    def test_wrong_sources_leave_no_module_behind(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        target = module(monkeypatch, tmp_path, "this is no C++")
        target.write_bytes(b"an older module")
        assert "failed:" in build_native.build()
        assert not target.exists()


def module(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> Path:
    """Makes the builder work on one source in a folder of its own."""
    monkeypatch.delenv(build_native.SKIP, raising=False)
    monkeypatch.setattr(build_native, "ENVOY", folder)
    monkeypatch.setattr(build_native, "SOURCES", folder / "native")
    monkeypatch.setattr(build_native, "TARGET", folder / "_native.so")
    monkeypatch.setattr(build_native, "RECORD", folder / "_native.for")
    (folder / "native").mkdir()
    (folder / "native" / "module.cc").write_text(source)
    return folder / "_native.so"
