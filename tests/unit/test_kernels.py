"""Each kernel against its NumPy reference, and the references against what others compute.

These tests ask for a `bench`: here it is on the CPU; tests/gpu runs the same ones on a GPU.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.kernel_bench import KernelBench

from forno.kernels import build, reference
from forno.kernels.devices import open_device

if TYPE_CHECKING:
    from collections.abc import Iterator

FLOATS = ("float16", "float32")
SPECIALS = (0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 65504.0, 65520.0, 5.9e-8, 2.9e-8, 1e-30, -3.5)
FEWER = settings(max_examples=40)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelBench]:
    if not build.compiler():
        pytest.skip("the kernels need a C++ compiler on the CPU")
    device = open_device("cpu")
    made = KernelBench(device, tmp_path_factory.mktemp("kernels"))
    yield made
    made.close()
    assert not any(device.statistics().values())


def floats(dtype: str, shape: Any) -> st.SearchStrategy[Any]:
    width = 16 if dtype == "float16" else 32
    elements = st.one_of(st.floats(width=width), st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf")]))
    return npst.arrays(dtype, shape, elements=elements)


def random_image(random: np.random.Generator, height: int, width: int, channels: int) -> Any:
    return random.integers(0, 256, (height, width, channels), np.uint8)


class TestImages:
    @FEWER
    @given(
        sizes=st.lists(st.tuples(st.integers(1, 37), st.integers(1, 41)), max_size=3),
        height=st.integers(1, 19),
        width=st.integers(1, 19),
        channels=st.integers(1, 4),
        antialias=st.booleans(),
        channels_last=st.booleans(),
        dtype=st.sampled_from(FLOATS),
        seed=st.integers(0, 99),
        more=st.none() | st.tuples(st.integers(0, 7), st.integers(0, 9)),
    )
    def test_any_sizes(
        self, bench: KernelBench, sizes: Any, height: int, width: int, channels: int, antialias: bool,
        channels_last: bool, dtype: str, seed: int, more: Any,
    ) -> None:  # fmt: skip
        random = np.random.default_rng(seed)
        images = [random_image(random, *size, channels) for size in sizes]
        scale, bias = random.uniform(0.001, 0.1, channels), random.uniform(-3, 3, channels)
        given: Any = (images, height, width, scale, bias)
        ways: Any = {"antialias": antialias, "channels_last": channels_last, "dtype": dtype}
        if more is not None:
            down, across = more
            windows = random.integers(0, [down + 1, across + 1], (len(images), 2)).tolist()
            ways["windows"] = [(height + down, width + across, *window) for window in windows]
        want = reference.image_to_tensor(*given, **ways)
        got = bench.image_to_tensor(*given, **ways)
        tolerance = 2e-2 if dtype == "float16" else 1e-4  # values reach 30, where float16 has steps of 1.6e-2
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=0, atol=tolerance)

    def test_sizes_far_apart(self, bench: KernelBench) -> None:
        # Coordinates of this size as plain float32 would be off by a tenth of a level.
        image = random_image(np.random.default_rng(0), 3, 30011, 1)
        given = ([image], 2, 97, [1.0], [0.0])
        for antialias in (False, True):
            got = bench.image_to_tensor(*given, antialias=antialias, dtype="float32")
            np.testing.assert_allclose(got, reference.image_to_tensor(*given, antialias=antialias), atol=2e-2)

    def test_the_same_size_changes_nothing(self, bench: KernelBench) -> None:
        image = random_image(np.random.default_rng(0), 17, 33, 3)
        got = bench.image_to_tensor([image], 17, 33, [1.0] * 3, [0.0] * 3, antialias=True, dtype="float32")
        np.testing.assert_array_equal(got[0], image.transpose(2, 0, 1))

    @pytest.mark.parametrize("channels", [0, 5])
    def test_channels_are_counted(self, bench: KernelBench, channels: int) -> None:
        image = np.zeros((2, 2, channels), np.uint8)
        with pytest.raises(ValueError, match=f"channels is {channels}, expected 1 to 4"):
            bench.image_to_tensor([image], 2, 2, [1.0] * channels, [0.0] * channels, antialias=True, dtype="float32")

    @pytest.mark.parametrize("size", [(31, 57), (64, 64), (5, 7)])
    def test_reference_is_pillows_bilinear(self, size: tuple[int, int]) -> None:
        image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
        pixels = random_image(np.random.default_rng(1), *size, 3)
        want = np.asarray(image.fromarray(pixels).resize((20, 24), image.Resampling.BILINEAR))
        got = reference.image_to_tensor([pixels], 24, 20, [1.0] * 3, [0.0] * 3, antialias=True)
        # Pillow rounds to bytes after each axis.
        np.testing.assert_allclose(got[0].transpose(1, 2, 0), want, atol=1.01)

    @pytest.mark.parametrize("antialias", [False, True])
    def test_reference_is_onnxs_linear(self, antialias: bool) -> None:
        onnx = pytest.importorskip("onnx", reason="onnx is not installed")
        runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
        pixels = random_image(np.random.default_rng(2), 31, 57, 1)
        helper = onnx.helper
        node = helper.make_node(
            "Resize", ["x", "", "", "sizes"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel",
            antialias=int(antialias), exclude_outside=int(antialias),
        )  # fmt: skip
        sizes = helper.make_tensor("sizes", onnx.TensorProto.INT64, [4], [1, 1, 24, 20])
        ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
        graph = helper.make_graph([node], "resize", ends[:1], ends[1:], [sizes])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        file = io.BytesIO()
        onnx.save(model, file)
        session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (want,) = session.run(None, {"x": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
        got = reference.image_to_tensor([pixels], 24, 20, [1.0], [0.0], antialias=antialias)
        np.testing.assert_allclose(got, want, atol=2e-2)


class TestRows:
    @FEWER
    @given(
        lengths=st.lists(st.integers(0, 70), max_size=6),
        width=st.integers(1, 67),
        dtype=st.sampled_from(["uint8", "int32", "int64", "float16", "float64", "bool"]),
        mask_bytes=st.sampled_from([0, 1, 4, 8]),
        seed=st.integers(0, 99),
    )
    def test_packed_and_back(
        self, bench: KernelBench, lengths: list[int], width: int, dtype: str, mask_bytes: int, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        rows = [random.integers(0, 100, length).astype(dtype) for length in lengths]
        want, want_mask = reference.pack_rows(rows, width, 1)
        got, mask = bench.pack_rows(rows, width, 1, mask_bytes)
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype
        if mask_bytes:
            np.testing.assert_array_equal(mask, want_mask)
        kept = [min(length, width) for length in lengths]
        if rows:
            arena = bench.unpack_rows(got, kept)
            np.testing.assert_array_equal(arena, reference.unpack_rows(got, kept))
            np.testing.assert_array_equal(arena, np.concatenate([row[:width] for row in rows]))

    def test_many_rows(self, bench: KernelBench) -> None:
        rows = [np.array([index], np.int32) for index in range(70_000)]  # more than a grid is high
        got, mask = bench.pack_rows(rows, 1, 0, 1)
        np.testing.assert_array_equal(got[:, 0], np.arange(70_000))
        assert mask.all()

    def test_a_mask_is_of_integers(self, bench: KernelBench) -> None:
        with pytest.raises(ValueError, match="integers of 2 bytes, expected 1, 4 or 8"):
            bench.pack_rows([np.zeros(3, np.int32)], 3, 0, 2)

    @FEWER
    @given(
        rows=st.integers(0, 9),
        places=st.permutations(range(-2, 12)),
        dims=st.integers(0, 19),
        dtype=st.sampled_from(["uint8", "float16", "float32", "float64", "complex128"]),
    )
    def test_scattered(self, bench: KernelBench, rows: int, places: list[int], dims: int, dtype: str) -> None:
        given = np.arange(rows * dims).reshape(rows, dims).astype(dtype)
        to = np.full((9, dims), 77, dtype)
        got = bench.scatter_rows(given, places[:rows], to)
        np.testing.assert_array_equal(got, reference.scatter_rows(given, places[:rows], to))


class TestTopK:
    @FEWER
    @given(data=st.data(), dtype=st.sampled_from(FLOATS), rows=st.integers(0, 3), softmax=st.booleans())
    def test_any_values(self, bench: KernelBench, data: Any, dtype: str, rows: int, softmax: bool) -> None:
        logits = data.draw(floats(dtype, (rows, data.draw(st.integers(1, 40)))))
        k = data.draw(st.integers(1, logits.shape[1]))
        values, indices = bench.softmax_topk(logits, k, softmax=softmax)
        want_values, want_indices = reference.softmax_topk(logits, k, softmax=softmax)
        np.testing.assert_array_equal(indices, want_indices)
        np.testing.assert_allclose(values, want_values, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("classes", [1, 31, 256, 257, 1000, 5003])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_many_classes(self, bench: KernelBench, classes: int, dtype: str) -> None:
        logits = np.random.default_rng(classes).normal(0, 5, (3, classes)).astype(dtype)
        k = min(classes, 7)
        values, indices = bench.softmax_topk(logits, k, softmax=True)
        want_values, want_indices = reference.softmax_topk(logits, k, softmax=True)
        np.testing.assert_array_equal(indices, want_indices)
        np.testing.assert_allclose(values, want_values, rtol=1e-4)

    def test_equal_values_come_in_order(self, bench: KernelBench) -> None:
        logits = np.array([[1, 2, 2, 0, 2], [0, -0.0, 0, -0.0, -1]], np.float32)
        _, indices = bench.softmax_topk(logits, 5, softmax=False)
        assert indices.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4]]

    def test_nan_comes_first_and_spoils_probabilities(self, bench: KernelBench) -> None:
        logits = np.array([[1, np.inf, np.nan]], np.float32)
        values, indices = bench.softmax_topk(logits, 3, softmax=True)
        assert indices.tolist() == [[2, 1, 0]]
        assert np.isnan(values).all()

    @pytest.mark.parametrize("k", [0, 4])
    def test_k_is_one_to_classes(self, bench: KernelBench, k: int) -> None:
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 3"):
            bench.softmax_topk(np.zeros((1, 3), np.float32), k, softmax=True)


class TestMeanPool:
    @FEWER
    @given(
        rows=st.integers(0, 3),
        tokens=st.integers(0, 9),
        dims=st.sampled_from([1, 3, 31, 33, 384]),
        normalise=st.booleans(),
        dtype=st.sampled_from(FLOATS),
        seed=st.integers(0, 99),
    )
    def test_any_shape(
        self, bench: KernelBench, rows: int, tokens: int, dims: int, normalise: bool, dtype: str, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        hidden = random.normal(0, 1, (rows, tokens, dims)).astype(dtype)
        mask = random.integers(0, 3, (rows, tokens))
        hidden[mask == 0] = random.choice([np.nan, np.inf, 1.0])  # padding is never read
        got = bench.mean_pool(hidden, mask, normalise=normalise)
        want = reference.mean_pool(hidden, mask, normalise=normalise)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    def test_a_row_without_tokens_is_zero(self, bench: KernelBench) -> None:
        got = bench.mean_pool(np.full((1, 2, 5), np.nan, np.float32), np.zeros((1, 2), np.int64), normalise=True)
        np.testing.assert_array_equal(got, np.zeros((1, 5)))

    def test_nan_of_a_token_is_seen(self, bench: KernelBench) -> None:
        hidden = np.array([[[1, np.nan], [1, 1]]], np.float32)
        got = bench.mean_pool(hidden, np.ones((1, 2), np.int64), normalise=False)
        np.testing.assert_array_equal(got, [[1, np.nan]])


class TestCast:
    @pytest.mark.parametrize(("short", "bits"), [(np.float16, np.uint16), (ml_dtypes.bfloat16, np.uint16)])
    def test_every_short_float(self, bench: KernelBench, short: Any, bits: Any) -> None:
        every = np.arange(1 << 16, dtype=bits).view(short)
        wide = bench.cast(every, np.float32)
        np.testing.assert_array_equal(wide, reference.cast(every, np.float32))
        same(bench.cast(wide, short), every)

    @pytest.mark.parametrize("short", [np.float16, ml_dtypes.bfloat16])
    @FEWER
    @given(data=st.data())
    def test_rounding(self, bench: KernelBench, short: Any, data: Any) -> None:
        elements = st.one_of(st.floats(width=32), st.sampled_from(np.float32(SPECIALS).tolist()))
        wide = data.draw(npst.arrays(np.float32, st.integers(0, 300), elements=elements))
        same(bench.cast(wide, short), reference.cast(wide, short))

    @pytest.mark.parametrize("short", [np.float16, ml_dtypes.bfloat16])
    def test_ties_go_to_even(self, bench: KernelBench, short: Any) -> None:
        every = np.arange((1 << 16) - 1, dtype=np.uint16)
        with np.errstate(invalid="ignore"):
            low, high = [(every + step).view(short).astype(np.float64) for step in np.array([0, 1], np.uint16)]
            between = ((low + high) / 2).astype(np.float32)
        same(bench.cast(between, short), reference.cast(between, short))

    def test_only_what_there_is(self, bench: KernelBench) -> None:
        with pytest.raises(ValueError, match="no cast from float32 to float32"):
            bench.cast(np.zeros(3, np.float32), np.float32)


def same(got: Any, want: Any) -> None:
    """Bit for bit, but that any NaN is as good as another."""
    nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])
