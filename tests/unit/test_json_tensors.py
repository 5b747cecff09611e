"""JSON bodies of models: the three forms, strictness, and that no body breaks the readers."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from forno.server.endpoints import json_body, json_document, json_inputs, json_numbers, json_outputs
from forno.server.errors import InvalidArgument
from forno.server.request import Answer
from forno.server.signature import Signature, TensorSpec
from forno.v1 import tensors

NUMERIC = [row.name for row in tensors.TABLE if row.name != "string"]


@pytest.fixture(params=["simdjson", "orjson"], autouse=True)
def reader(request, monkeypatch):
    """Every test runs with and without the accelerator, which is made to see short runs too."""
    if request.param == "orjson":
        monkeypatch.setattr(json_numbers, "simdjson", None)
    else:
        pytest.importorskip("simdjson")
        monkeypatch.setattr(json_numbers, "_MIN_BYTES", 6)
    return request.param


def signature(*inputs, outputs=(), batched=True):
    return Signature(tuple(inputs), tuple(outputs), batched)


def spec(name="x", data_type="float32", shape=(-1, 2)):
    return TensorSpec(name, tensors.dtype_named(data_type), shape)


def read(text, *specs):
    """The tensors of a body, by name."""
    body = json_body.parse(text if isinstance(text, bytes) else json.dumps(text).encode())
    return json_inputs.tensors_of(body, signature(*(specs or (spec(),))))


def refusal(text, *specs):
    with pytest.raises(InvalidArgument) as caught:
        read(text, *specs)
    return str(caught.value)


def write(text, outputs, specs, rows=1):
    body = json_body.parse(json.dumps(text).encode())
    answer = Answer(outputs, 1, 2, 3)
    value = json_outputs.document(body, answer, signature(outputs=specs), rows=rows, model="m", version="7")
    return json_outputs.dumps(value)


class TestForms:
    @pytest.mark.parametrize(
        "body",
        [
            {"instances": [[1, 2], [3, 4]]},
            {"instances": [{"x": [1, 2]}, {"x": [3, 4]}]},
            {"inputs": [[1, 2], [3, 4]]},
            {"inputs": {"x": [[1, 2], [3, 4]]}},
            {"inputs": [{"name": "x", "data": [[1, 2], [3, 4]]}]},
            {"inputs": [{"name": "x", "data": [1, 2, 3, 4]}]},
            {"inputs": [{"name": "x", "data": [1, 2, 3, 4], "shape": [2, 2]}]},
            {"inputs": [{"name": "x", "data_type": "float32", "shape": [2, 2], "data": [[1, 2], [3, 4]]}]},
            {"inputs": [{"name": "x", "b64": base64.b64encode(np.float32([1, 2, 3, 4]).tobytes()).decode()}]},
            {"inputs": [[1, 2], [3, 4]], "signature_name": "serving_default"},
        ],
        ids=str,
    )
    def test_every_form_of_one_input_reads_the_same(self, body):
        array = read(body)["x"]
        assert array.dtype == np.float32
        assert array.tolist() == [[1, 2], [3, 4]]

    @pytest.mark.parametrize(
        "body",
        [
            {"instances": [{"a": [1, 2], "b": "p"}, {"b": "q", "a": [3, 4]}]},
            {"inputs": {"a": [[1, 2], [3, 4]], "b": ["p", "q"]}},
            {"inputs": [{"name": "b", "data": ["p", "q"]}, {"name": "a", "data": [1, 2, 3, 4]}]},
        ],
        ids=str,
    )
    def test_every_form_of_two_inputs_reads_the_same(self, body):
        arrays = read(body, spec("a", "int64"), spec("b", "string", (-1,)))
        assert arrays["a"].tolist() == [[1, 2], [3, 4]]
        assert arrays["b"].tolist() == ["p", "q"]

    def test_the_envelope_says_what_is_wanted(self):
        body = json_body.parse(
            b'{"model":"m","version":3,"inputs":[],"outputs":["y"],"request_id":"r",'
            b'"parameters":{"priority":-5,"queue_timeout_ms":1.5}}'
        )
        assert (body.form, body.model, body.version, body.outputs) == ("native", "m", "3", ("y",))
        assert (body.request_id, body.priority, body.queue_timeout_us) == ("r", -5, 1500)

    def test_strings_that_are_not_text_come_as_base64_in_every_form(self):
        names = spec("x", "string", (-1,))
        for body in (
            {"instances": [{"b64": "//4="}, "é"]},
            {"inputs": [{"b64": "//4="}, "é"]},
            {"inputs": {"x": [{"b64": "//4="}, {"b64": "w6k="}]}},
            {"inputs": [{"name": "x", "shape": [2], "b64": "AgAAAP/+AgAAAMOp"}]},
        ):
            assert read(body, names)["x"].tolist() == [b"\xff\xfe", "é"]

    def test_a_scalar_input_takes_one_value(self):
        assert read({"inputs": 3.5}, spec(shape=()))["x"].shape == ()

    def test_numbers_beyond_doubles_survive(self):
        big = 9007199254740993
        assert read({"instances": [[big, -big]]}, spec("x", "int64"))["x"].tolist() == [[big, -big]]
        limit = 2**64 - 1
        assert read({"instances": [[limit, 0]]}, spec("x", "uint64"))["x"].tolist() == [[limit, 0]]

    def test_not_finite_numbers_are_strings(self):
        array = read({"instances": [["NaN", "Infinity"], ["-Infinity", 1]]})["x"]
        assert math.isnan(array[0, 0])
        assert array.ravel()[1:].tolist() == [math.inf, -math.inf, 1]

    def test_whole_floats_are_integers(self):
        assert read({"instances": [[1.0, 2e3]]}, spec("x", "int16"))["x"].tolist() == [[1, 2000]]

    def test_empty_lists_have_a_shape(self):
        assert read({"inputs": [[], []]})["x"].shape == (2, 0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("data_type", "value", "words"),
        [
            ("int64", 1.5, ["instances[1][0]", "1.5", "int64"]),
            ("int64", 9223372036854775808, ["9223372036854775808", "int64 holds"]),
            ("int8", 128, ["is 128", "-128 to 127"]),
            ("uint8", -1, ["is -1", "0 to 255"]),
            ("uint64", -1, ["is -1"]),
            ("uint64", 1e300, ["1e+300"]),
            ("int64", "5", ['"5"', "a number"]),
            ("float32", True, ["is true", "float32"]),
            ("float32", None, ["is null"]),
            ("float32", "nan", ['"nan"', '"NaN"']),
            ("float32", {}, ["an object"]),
            ("float32", 1e39, ["1e+39", "out of range"]),
            ("float16", 70000, ["70000", "out of range"]),
            ("bool", 1, ["is 1", "true or false"]),
            ("string", 1, ["is 1", "b64"]),
            ("string", {"b64": "?"}, ["base64"]),
            ("string", {"b64": "", "x": 1}, ["an object"]),
        ],
    )
    def test_an_element_that_does_not_fit_is_named(self, data_type, value, words):
        filler = {"bool": True, "string": "s"}.get(data_type, 0)
        rows = [[filler, filler], [value, filler]]
        message = refusal({"instances": rows}, spec("x", data_type))
        for word in ["input 'x'", "instances[1][0]", *words]:
            assert word in message
        message = refusal({"instances": [{"x": row} for row in rows]}, spec("x", data_type))
        assert "instances[1].x[0]" in message

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            ([[1, 2], [3]], ["instances[1] is a list of 1", "instances[0] is a list of 2"]),
            ([[1, 2], 3], ["instances[1] is one element"]),
            ([1, [2]], ["instances[1] is a list of 1", "instances[0] is one element"]),
            ([[[1], [2]], [[3], [4, 5]]], ["instances[1][1] is a list of 2"]),
            ([[], [1]], ["instances[1] is a list of 1"]),
        ],
    )
    def test_ragged_lists_are_named(self, rows, words):
        message = refusal({"instances": rows})
        for word in words:
            assert word in message

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ([1], ["a list", "instances"]),
            ({}, ["instances", "inputs"]),
            ({"instances": [1], "inputs": [1]}, ["exactly one"]),
            ({"instance": [[1, 2]]}, ["`instance`", "did you mean `instances`?"]),
            ({"instances": []}, ["empty list"]),
            ({"instances": {"x": 1}}, ["an object", "list of at least one row"]),
            ({"instances": [{"y": 1}]}, ["instances[0].y", "did you mean `x`?"]),
            ({"instances": [{"x": [1, 2]}, {}]}, ["instances[1]", "'x'"]),
            ({"instances": [{"x": [1, 2]}, 3]}, ["instances[1]", "is 3"]),
            ({"inputs": {"xx": [1, 2]}}, ["inputs.xx", "did you mean `x`?"]),
            ({"inputs": [{"name": "x"}]}, ["exactly one of `data` and `b64`"]),
            ({"inputs": [{"data": [1]}]}, ["no `name`"]),
            ({"inputs": [{"name": "y", "data": [1]}]}, ["inputs[0].name", "did you mean 'x'?"]),
            ({"inputs": [{"name": ["x"], "data": [1]}]}, ["inputs[0].name", "a list"]),
            ({"inputs": [{"name": "x", "data": [1, 2]}] * 2}, ["inputs[1].name", "earlier"]),
            ({"inputs": [{"name": "x", "data": [1, 2]}, 5]}, ["inputs[1]", "is 5"]),
            ({"inputs": [{"name": "x", "dtype": "f", "data": [1]}]}, ["inputs[0].dtype", "data_type"]),
            ({"inputs": [{"name": "x", "data_type": "FP32", "data": [1]}]}, ["FP32", "float32[?, 2]"]),
            ({"inputs": [{"name": "x", "data": [1, 2, 3]}]}, ["3 values", "shape"]),
            ({"inputs": [{"name": "x", "data": [1, 2], "shape": [2, 2]}]}, ["2 values", "needs 4"]),
            ({"inputs": [{"name": "x", "data": [[1, 2]], "shape": [2, 1]}]}, ["nested as [1, 2]"]),
            ({"inputs": [{"name": "x", "data": [1, 2], "shape": [-1, 2]}]}, ["shape[0]", "-1"]),
            ({"inputs": [{"name": "x", "data": [1, 2], "shape": 2}]}, ["inputs[0].shape", "is 2"]),
            ({"inputs": [{"name": "x", "b64": "AAAA"}]}, ["3 bytes", "needs 4"]),
            ({"inputs": [{"name": "x", "b64": "AAAAAA=="}]}, ["1 elements", "float32[?, 2]"]),
            ({"inputs": [{"name": "x", "b64": 5}]}, ["inputs[0].b64", "5"]),
            ({"inputs": [[1, 2]], "signature_name": "classify"}, ["serving_default"]),
            ({"inputs": [[1, 2]], "parameters": {"prio": 1}}, ["parameters.prio", "priority"]),
            ({"inputs": [[1, 2]], "parameters": {"priority": 101}}, ["101", "100"]),
            ({"inputs": [[1, 2]], "parameters": {"queue_timeout_ms": 0}}, ["over 0"]),
            ({"inputs": [[1, 2]], "parameters": []}, ["parameters", "a list"]),
            ({"inputs": [[1, 2]], "outputs": "y"}, ["outputs", '"y"']),
            ({"inputs": [[1, 2]], "request_id": "r" * 129}, ["129"]),
            ({"inputs": [[1, 2]], "model": 5}, ["model", "is 5"]),
        ],
        ids=str,
    )
    def test_a_wrong_envelope_says_what_to_change(self, body, words):
        message = refusal(body)
        for word in words:
            assert word in message, message

    def test_values_without_names_need_one_input(self):
        message = refusal({"instances": [[1, 2]]}, spec("a"), spec("b"))
        assert "2 inputs" in message
        assert "'a' and 'b'" in message

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (b"", ["empty"]),
            (b"  \n", ["empty"]),
            (b'{"instances":', ["not JSON", "byte"]),
            (b'{"instances":[[1,,2]]}', ["byte 17"]),
            ('{"é":1, x}'.encode(), ["byte 9"]),
            (b'{"instances":[[NaN,1]]}', ["NaN", "byte 15", "string"]),
            (b'{"instances":[[1,-Infinity]]}', ['"-Infinity"']),
            (b'{"instances":[[Infinity]]}', ['"Infinity"']),
            (b'{"instances":[[1,2]],"instances":[[3,4]]}', ["`instances`", "twice"]),
            (b'{"inputs":{"x":[[1,2]],"x":[[3,4]]}}', ["`x`", "twice"]),
            (b'{"inputs":[{"name":"x","data":[1,2],"data":[3,4]}]}', ["`data`", "twice"]),
            (b"[" * 100_000, ["byte"]),
            (b'{"instances":' + b"[" * 100_000, ["byte"]),
            (b'{"instances":' + b"[" * 900 + b"]" * 900 + b"}", ["deeper than 32"]),
            (b'{"instances":[[1,2]]}\xff', ["byte"]),
            (b'{"instances":[[1e999,2]]}', ["byte"]),
            (b'{"instances":[[1,2]', ["byte"]),
            (b'{"instances":[1[,2]]}', ["byte"]),
            (b'{"instances":[[01,2]]}', ["byte"]),
            (b'{"\\u0000":0,"instances":[[1,2]]}', ["unknown"]),
            (b'{"instances":{"\\u0000":0}}', ["an object"]),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_body_that_is_not_readable_says_where(self, text, words):
        message = refusal(text)
        for word in words:
            assert word in message, message

    def test_a_colon_in_a_text_is_no_repeated_key(self):
        assert read({"instances": ["a: b", "c"]}, spec("x", "string", (-1,)))["x"].tolist() == ["a: b", "c"]


class TestAnswers:
    def test_rows_of_one_output_are_values(self):
        out = write({"instances": [1, 2]}, [np.float32([[0.1], [0.2]])], [spec("y")], rows=2)
        assert out == b'{"predictions":[[0.1],[0.2]]}'

    def test_rows_of_several_outputs_are_objects(self):
        outputs = [np.int64([1, 2]), np.array(["a", b"\xff"], object)]
        specs = [spec("n", "int64", (-1,)), spec("s", "string", (-1,))]
        out = write({"instances": [1, 2]}, outputs, specs, rows=2)
        assert orjson.loads(out) == {"predictions": [{"n": 1, "s": "a"}, {"n": 2, "s": {"b64": "/w=="}}]}

    def test_rows_need_an_output_row_each(self):
        with pytest.raises(InvalidArgument, match=r"shape \[1\], not one row for each of 2"):
            write({"instances": [1, 2]}, [np.float32([1])], [spec("y")], rows=2)

    def test_columns_drop_the_name_of_a_single_output(self):
        assert write({"inputs": 1}, [np.float32([0.5])], [spec("y")]) == b'{"outputs":[0.5]}'
        out = write({"inputs": 1}, [np.float32([0.5]), np.bool_([True])], [spec("y"), spec("z")])
        assert out == b'{"outputs":{"y":[0.5],"z":[true]}}'

    def test_native_tells_all(self):
        body = {"inputs": [], "request_id": "r", "outputs": ["z"]}
        out = write(body, [np.float32(1), np.float32([[1, np.nan]])], [spec("y"), spec("z")])
        assert orjson.loads(out) == {
            "model": "m",
            "version": "7",
            "request_id": "r",
            "outputs": [{"name": "z", "data_type": "float32", "shape": [1, 2], "data": [[1.0, "NaN"]]}],
            "timings": {"queue_us": 1, "compute_us": 2, "batch_rows": 3},
        }

    def test_an_unknown_output_is_refused(self):
        with pytest.raises(InvalidArgument, match="output 'q' is unknown"):
            write({"inputs": [], "outputs": ["q"]}, [np.float32(1)], [spec("y")])


def arrays(data_type):
    dtype = tensors.dtype_named(data_type)
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    if data_type == "bfloat16":
        return hnp.arrays(np.uint16, shapes).map(lambda array: array.view(dtype))
    return hnp.arrays(dtype, shapes)


def same(left, right):
    if left.dtype.kind in "fV":
        with np.errstate(invalid="ignore"):  # a NaN that signals is one nevertheless
            left, right = left.astype(np.float64), right.astype(np.float64)
        return np.array_equal(left, right, equal_nan=True)
    return np.array_equal(left, right)


class TestRoundTrips:
    @pytest.mark.parametrize("data_type", NUMERIC)
    def test_numbers_come_back_exactly(self, data_type):
        @settings(max_examples=60, deadline=None)
        @given(arrays(data_type))
        def check(array):
            wanted = spec("x", data_type, (-1,) * array.ndim)
            for form in ({"inputs": []}, {"inputs": 0}):
                value = json_outputs.document(
                    json_body.of_value(form),
                    Answer([array], 0, 0, 1),
                    signature(outputs=[wanted]),
                    rows=1,
                    model="m",
                    version="1",
                )
                inputs = value["outputs"] if form == {"inputs": []} else {"x": value["outputs"]}
                back = read(json_outputs.dumps({"inputs": inputs}), wanted)["x"]
                if form == {"inputs": []} or array.size:  # lists of nothing do not say what they lack
                    assert back.shape == array.shape
                assert back.dtype == array.dtype
                assert same(back.reshape(array.shape), array)

        check()

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.one_of(st.text(), st.binary()), min_size=1, max_size=6))
    def test_strings_come_back_exactly(self, values):
        array = np.empty(len(values), object)
        array[:] = values
        wanted = spec("x", "string", (-1,))
        body = json_body.of_value({"inputs": 0})
        value = json_outputs.document(
            body, Answer([array], 0, 0, 1), signature(outputs=[wanted]), rows=1, model="m", version="1"
        )
        text = json_outputs.dumps({"inputs": {"x": value["outputs"]}})
        back = read(text, wanted)["x"].tolist()
        as_bytes = [value.encode() if isinstance(value, str) else value for value in values]
        assert [value.encode() if isinstance(value, str) else value for value in back] == as_bytes


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["x", "name", "data", "shape", "b64", "inputs", "instances", "data_type", "parameters", "q"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


class TestNothingBreaksTheReader:
    SPECS = (spec(), spec("x", "string", (-1,)), spec("x", "int64", (-1,)), spec("x", "bool", ()))

    def attempt(self, text):
        for wanted in self.SPECS:
            try:
                read(text, wanted)
            except InvalidArgument as error:
                assert str(error)  # noqa: PT017  (any other error is what the test is for)

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=60))
    def test_random_bytes(self, data):
        self.attempt(data)

    @settings(max_examples=300, deadline=None)
    @given(JSON, st.sampled_from(["inputs", "instances", "inputs.x", "item"]))
    def test_random_values_in_the_right_places(self, value, place):
        body = {
            "inputs": {"inputs": value},
            "instances": {"instances": value},
            "inputs.x": {"inputs": {"x": value}},
            "item": {"inputs": [{"name": "x", "data": value, "shape": value if isinstance(value, list) else [1]}]},
        }[place]
        self.attempt(json.dumps(body).encode())

    @settings(max_examples=300, deadline=None)
    @given(st.text('[]0123456789.,-e{}":x ntrue', max_size=40), st.integers(0, 60))
    def test_almost_tensors(self, text, cut):
        body = b'{"instances":[[1,2],[3,4.5]],"model":"m"}'
        self.attempt(body[:cut] + text.encode() + body[cut:])
        self.attempt(b'{"instances":[' + text.encode() + b"]}")

    @settings(max_examples=300, deadline=None)
    @given(st.text("[]019.,-e ", max_size=24))
    @example("[[[[[[")
    def test_the_accelerator_agrees_with_the_plain_reader(self, text):
        body = b'{"instances":[' + text.encode() + b'],"model":"m"}'
        outcomes = []
        for parse in (json_body.parse, json_body.parse_plainly):
            try:
                array = json_inputs.tensors_of(parse(body), signature(spec()))["x"]
                outcomes.append((array.shape, array.tobytes()))
            except InvalidArgument as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_long_runs_are_lifted_where_the_accelerator_is(reader):
    rows = np.random.default_rng(0).random((3, 20, 30)).astype(np.float32)
    text = orjson.dumps({"instances": rows}, option=orjson.OPT_SERIALIZE_NUMPY)
    body = json_body.parse(text)
    assert bool(body.runs) == (reader == "simdjson")
    assert np.array_equal(json_inputs.tensors_of(body, signature(spec(shape=(-1, 20, 30))))["x"], rows)


def test_documents_are_strict_everywhere():
    assert json_document.parse(b'{"a":{"b":[{"c":{"d":{"e":1}}}]}}') == {"a": {"b": [{"c": {"d": {"e": 1}}}]}}
    with pytest.raises(InvalidArgument, match="`e` occurs twice"):
        json_document.parse(b'{"a":{"b":[{"c":{"d":{"e":1,"e":2}}}]}}')
