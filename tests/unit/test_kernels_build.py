"""Kernels are built from source for whatever device is there, once."""

from __future__ import annotations

import logging
import re
import subprocess
from ctypes import c_int32
from pathlib import Path

import build_kernels
import pytest
from tests.compiling import NATIVE, needs_compiler

from forno.kernels import build
from forno.kernels.devices import DeviceError, DeviceUnavailable, open_device
from forno.kernels.library import packed

NAMES = sorted(
    name
    for path in build.SOURCES.glob("*.cu")
    for macro, prefixes in {
        "IMAGE_TO_TENSOR": ("image_to_tensor_",),
        "PACK_ROWS": ("pack_rows_", "unpack_rows_"),
        "SCATTER_ROWS": ("scatter_rows_",),
        "SOFTMAX_TOPK": ("softmax_topk_",),
        "MEAN_POOL": ("mean_pool_",),
        "CAST": ("cast_",),
    }.items()
    for found in re.findall(rf"^{macro}\(([a-z0-9, ]+)\)$", path.read_text(), re.MULTILINE)
    for name in [prefix + found.replace(", ", "_") for prefix in prefixes]
)


def nvrtc_obstacle() -> str:
    try:
        build._gpu_builder()
    except DeviceUnavailable as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def prebuilt_place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built here before is of no interest."""
    folder = tmp_path_factory.mktemp("prebuilt")
    for name in ("PREBUILT", "PREBUILT_FOR"):
        monkeypatch.setattr(build, name, folder / name)


@pytest.mark.skipif(bool(nvrtc_obstacle()), reason=nvrtc_obstacle())
class TestForGpus:
    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
    def test_every_kernel_fits_without_a_gpu_here(self, architecture: str) -> None:
        binary, said = build.compiled(architecture, ("--ptxas-options=-v",))
        assert binary.startswith(b"\x7fELF")
        amounts = build.resources(said)
        assert sorted(amounts) == NAMES
        for name, amount in amounts.items():
            # 65,536 registers are 128 for each of 512 threads: at 64, four blocks of 256 run side by side.
            assert amount["registers"] <= 64, (name, amount)
            assert amount["spilled_bytes"] == 0, (name, amount)
            assert amount["shared_bytes"] <= 1024, (name, amount)
        assert "warning" not in said

    def test_ptx_is_for_gpus_to_come(self) -> None:
        binary, _ = build.compiled("compute_80")
        assert sorted(re.findall(r"\.visible \.entry (\w+)\(", binary.decode())) == NAMES

    def test_an_unknown_architecture_is_named(self) -> None:
        with pytest.raises(build.BuildFailed, match="sm_12345"):
            build.compiled("sm_12345")

    def test_kept_for_the_next_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = build.kernels_for("sm_90", tmp_path)
        monkeypatch.setattr(build, "_built_for_gpu", never)
        assert build.kernels_for("sm_90", tmp_path) == first
        with pytest.raises(AssertionError, match="built again"):
            build.kernels_for("sm_80", tmp_path)


class TestPrebuilt:
    """Packages that were built where there was nvcc bring a file for all GPUs."""

    def test_it_is_taken_only_if_it_is_of_these_sources(self, tmp_path: Path) -> None:
        assert build.prebuilt() is None
        build.PREBUILT.write_bytes(b"for all GPUs")
        build.PREBUILT_FOR.write_text(build.prebuilt_fingerprint())
        assert build.kernels_for("sm_90", tmp_path) == b"for all GPUs"
        build.PREBUILT_FOR.write_text("other sources")
        assert build.prebuilt() is None

    def test_without_nvcc_there_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert "there is no nvcc" in build_kernels.build()

    @pytest.mark.slow
    @pytest.mark.skipif(not build_kernels.nvcc(), reason="there is no nvcc")
    def test_nvcc_builds_every_kernel(self) -> None:
        assert "kernels built for compute capabilities 75, 80" in build_kernels.build()
        ready = build.prebuilt()
        assert ready is not None
        assert all(name.encode() in ready for name in NAMES)
        assert build_kernels.build() == "kernels for GPUs are current"


@needs_compiler
class TestForTheCpu:
    def test_kept_for_the_next_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = build.kernels_for("cpu", tmp_path / "new")
        assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [first]
        monkeypatch.setattr(build, "_built_for_cpu", never)
        assert build.kernels_for("cpu", tmp_path / "new") == first

    def test_never_older_than_the_sources(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given_sources(monkeypatch, tmp_path, "")
        build.kernels_for("cpu", tmp_path / "cache")
        (tmp_path / "forno.cu").write_text("// changed")
        monkeypatch.setattr(build, "_built_for_cpu", never)
        with pytest.raises(AssertionError, match="built again"):
            build.kernels_for("cpu", tmp_path / "cache")

    def test_a_folder_that_cannot_be_written_costs_time_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        given_sources(monkeypatch, tmp_path, "")
        (tmp_path / "file").write_text("where a folder should be")
        with caplog.at_level(logging.WARNING):
            assert build.kernels_for("cpu", tmp_path / "file")
        assert "cannot be kept" in caplog.text

    def test_a_source_that_does_not_compile_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given_sources(monkeypatch, tmp_path, "this is no C++")
        with pytest.raises(build.BuildFailed, match=r"cannot build the kernels: .*forno\.cu"):
            build.kernels_for("cpu", tmp_path / "cache")

    def test_a_barrier_that_not_all_come_to_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = "__global__ void stuck(int all) { if (all || threadIdx.x < 40) __syncthreads(); }\nEXPORT(stuck)"
        for header in ("cpu.h", "common.cuh"):
            (tmp_path / header).write_text((build.SOURCES / header).read_text())
        given_sources(monkeypatch, tmp_path, '#include "common.cuh"\n' + source)
        device = open_device("cpu")
        module = device.load_module(build.kernels_for("cpu", tmp_path / "cache"))
        stream, function = device.new_stream(), device.function(module, "stuck")
        for all_come in (1, 0, 1):  # and afterwards all is as it was
            device.launch(function, (1, 1, 1), (64, 1, 1), packed([c_int32(all_come)]), stream)
            if all_come:
                device.finish(stream)
            else:
                with pytest.raises(DeviceError, match="'stuck' failed: not all threads of a block come to a barrier"):
                    device.finish(stream)
        device.launch(function, (1, 1, 1), (40, 1, 1), packed([c_int32(1)]), stream)
        with pytest.raises(DeviceError, match="no whole warps"):
            device.finish(stream)

    def test_threads_do_not_race(self, tmp_path: Path) -> None:
        program = tmp_path / "kernel_races"
        options = ["-std=c++17", "-g", "-O1", "-fsanitize=thread", "-Wno-unknown-pragmas", f"-I{build.SOURCES}"]
        command = [*build.compiler(), *options, str(NATIVE / "kernel_races.cc"), "-o", str(program)]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        if compiled.returncode != 0 and "tsan" in compiled.stderr:
            pytest.skip("the compiler has no ThreadSanitizer")
        assert compiled.returncode == 0, compiled.stderr
        racy = subprocess.run([program, "racy"], capture_output=True, text=True, check=False)
        if "unexpected memory mapping" in racy.stderr:
            pytest.skip("ThreadSanitizer cannot run on this kernel")
        assert "data race" in racy.stderr
        assert "in racy" in racy.stderr
        kernels = subprocess.run([program], capture_output=True, text=True, check=False)
        assert (kernels.returncode, kernels.stdout) == (0, "outcome 0\n"), kernels.stderr[:2000]


def test_no_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeviceUnavailable, match=r"^the kernels need a C\+\+ compiler on the CPU; install one .*$"):
        build.kernels_for("cpu", tmp_path)


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.default_cache() == tmp_path / "forno" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.default_cache() == Path.home() / ".cache" / "forno" / "kernels"


def given_sources(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    (folder / "forno.cu").write_text(text)
    monkeypatch.setattr(build, "SOURCES", folder)


def never(architecture: str) -> bytes:
    raise AssertionError("built again")
