"""Settings: where they come from, and what is said of wrong ones."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from forno.server import config
from forno.server.address import Address
from forno.server.config import Config, ModelSettings
from forno.server.errors import ConfigError
from forno.server.settings import Override, load, load_model, parse_set, shape
from forno.server.settings.complaints import unknown
from forno.server.settings.reference import entries
from forno.server.spelling import nearest

KEYS = [
    *shape.paths(Config),
    *(("models", "spam", *path) for path in shape.paths(ModelSettings)),
    *(("endpoints", "spam/detect", *path) for path in shape.paths(config.EndpointSettings)),
]


@pytest.fixture
def written(tmp_path):
    def write(text: str | bytes, name: str = "forno.yaml") -> Path:
        file = tmp_path / name
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    return write


def fault(file: Path | None = None, **overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, **overrides)
    return str(caught.value).replace(f"{file}", "forno.yaml")


def test_nothing_given_is_all_defaults():
    assert load() == Config()


def test_the_later_layer_wins(written):
    file = written("server: {drain_s: 1, log_level: debug, address: a:1}")
    environment = {"FORNO_SERVER__DRAIN_S": "2", "FORNO_SERVER__ADDRESS": "b:2", "HOME": "/"}
    server = load(file, environment, [Override(("server", "address"), "c:3", "--address")]).server
    assert (server.log_level, server.drain_s, server.address) == ("debug", 2.0, "c:3")


def test_model_paths_are_relative_to_the_file_that_says_so(written):
    file = written("models: {a: {path: m/a}, b: {path: /m/b}}")
    models = load(file, {"FORNO_MODELS__c__PATH": "m/c"}).models
    assert [model.path for model in models.values()] == [file.parent / "m/a", Path("/m/b"), Path("m/c")]


def test_versions_and_labels_may_be_written_as_numbers(written):
    model = load(written("models: {a: {versions: [1, 20], labels: {stable: 1}}}")).models["a"]
    assert model.versions == ("1", "20")
    assert model.labels == {"stable": "1"}
    assert load(written("models: {a: {versions: 3}}")).models["a"].versions == 3


def test_engine_null_is_the_engine_and_an_empty_section_is_empty(written):
    loaded = load(written("server:\nmodels:\n  a:\n    engine: null\n  b:\nendpoints:\n"))
    assert loaded.models["a"].engine == "null"
    assert loaded.models["b"] == ModelSettings()
    assert loaded.server == config.ServerSettings()


def test_a_config_survives_json(written):
    loaded = load(written("models: {a: {engine: null, versions: [1]}, b: {path: x.onnx}}"))
    assert Config.model_validate_json(loaded.model_dump_json()) == loaded


def test_values_are_those_of_yaml_1_2(written):
    text = "models: {a: {labels: {on: no, octal: 010, time: 12:30, float: 1e3}}}"
    assert load(written(text)).models["a"].labels == {
        "on": "no",
        "octal": "10",
        "time": "12:30",
        "float": "1000.0",
    }
    assert load(written("server: {drain_s: 1e3}")).server.drain_s == 1000


def test_anchors_and_merge_keys_work(written):
    text = "models:\n  a: &a {batching: {max_rows: 8}, labels: {x: 1}}\n  b: {<<: *a, labels: {y: 2}}\n"
    model = load(written(text)).models["b"]
    assert model.batching.max_rows == 8
    assert model.labels == {"y": "2"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server:\n  adress: a:1", "forno.yaml:2: server.adress is not a setting; did you mean `address`?"),
        ("sever: {}", "forno.yaml:1: sever is not a setting; did you mean `server`?"),
        ("adress: a:1", "forno.yaml:1: adress is not a setting; did you mean `server.address`?"),
        (
            "zebra: 1",
            (
                "forno.yaml:1: zebra is not a setting; the top level has server, models, endpoints, fleet, "
                "telemetry and security"
            ),
        ),
        ("address: a:1", "forno.yaml:1: address is not a setting; did you mean `server.address`?"),
        (
            "models: {a: {max_row: 1}}",
            "forno.yaml:1: models.a.max_row is not a setting; did you mean `batching.max_rows`?",
        ),
        (
            "server: {qqqq: 1}",
            (
                "forno.yaml:1: server.qqqq is not a setting; server has address, socket_access, transport, "
                "max_message_bytes, max_connections, max_heap_bytes, max_call_s, drain_s, log_level, log_format and "
                "envoy_threads"
            ),
        ),
        (
            "server: {transport: evoy}",
            "forno.yaml:1: server.transport is 'evoy'; expected envoy, proxy or grpc",
        ),
        ("server: {drain_s: -1}", "forno.yaml:1: server.drain_s is -1; expected a number from 0 to 3600"),
        ("server: {drain_s: .nan}", "forno.yaml:1: server.drain_s is nan; expected a number from 0 to 3600"),
        (
            "server: {envoy_threads: true}",
            "forno.yaml:1: server.envoy_threads is true; expected a whole number from 1 to 256",
        ),
        (
            "server: {envoy_threads: '2'}",
            "forno.yaml:1: server.envoy_threads is '2'; expected a whole number from 1 to 256",
        ),
        ("server: [a]", "forno.yaml:1: server is ['a']; expected a mapping of `name: value`"),
        (
            "server: {address: localhost}",
            (
                "forno.yaml:1: server.address is 'localhost'; expected HOST:PORT with a port "
                "from 0 to 65535, such as 127.0.0.1:8080, 0.0.0.0:80 or [::1]:8080, or unix:PATH"
            ),
        ),
        ("server: {address: }", "forno.yaml:1: server.address is empty; expected a text"),
        (
            "models: {a: {versions: 0}}",
            ("forno.yaml:1: models.a.versions is 0; expected a whole number of 1 or more or a list such as [a, b]"),
        ),
        (
            "models: {a: {null: {shape: [1, x]}}}",
            "forno.yaml:1: models.a.null.shape is [1, 'x']; expected a list such as [-1, 64]",
        ),
        (
            "models: {a: {batching: {enabled: 7}}}",
            "forno.yaml:1: models.a.batching.enabled is 7; expected true or false",
        ),
        ("endpoints: {e: {}}", "forno.yaml:1: endpoints.e.model is missing; expected a text"),
        (
            "endpoints: {e: {model: m, version: 1, label: x}}",
            "forno.yaml:1: endpoints.e takes `version` 1 or `label` x, not both",
        ),
        ("a: 1\nserver: {}\na: 2", "forno.yaml:3: `a` is given twice, first on line 1"),
        ("a: [", "forno.yaml:2:1: not YAML: did not find expected node content"),
        (
            "a:\n\tb: 1",
            (
                "forno.yaml:2:1: not YAML: found character that cannot start any token "
                "(YAML indents with spaces, here is a tab)"
            ),
        ),
        ("a: 1\n---\nb: 1", "forno.yaml:2:1: not YAML: but found another document"),
        ("- a", "forno.yaml:1: expected settings as `name: value` lines"),
        ("just words", "forno.yaml:1: expected settings as `name: value` lines"),
        ("a: &x {b: *x}", "forno.yaml:1: this value contains itself"),
        (
            "a: !!python/object:os.system x",
            "forno.yaml:1: the tag !!python/object:os.system means nothing here; write the plain value",
        ),
        ("a: !!int x", "forno.yaml:1: 'x' is no int"),
        ("? [a]\n: b", "forno.yaml:1: a key is a list or a mapping; expected a name"),
        (b"\xff\xfe\x00", "forno.yaml: is not UTF-8 text (byte 0); expected a YAML file"),
    ],
)
def test_a_wrong_file_is_told_by_line(written, text, expected):
    assert fault(written(text)) == expected


def test_every_fault_has_a_line(written):
    lines = fault(written("server:\n  adress: x\n  drain_s: x\nmodel: {}")).splitlines()
    assert [line.split(":")[1] for line in lines] == ["3", "2", "4"]


def test_many_faults_do_not_fill_the_screen(written):
    file = written("models: {" + ", ".join(f"m{number}: {{path: a.onnx, no: 1}}" for number in range(500)) + "}")
    with pytest.raises(ConfigError) as error:
        load(file)
    *told, last = str(error.value).splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in told] == [f"models.m{number}.no" for number in range(20)]
    assert last == f"{file}: 480 more faults"


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert fault(tmp_path / "none.yaml") == "forno.yaml: cannot be read: No such file or directory"


def test_a_file_of_anchors_that_multiply_ends(written):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "more than 100000 values in one file" in fault(written("\n".join(lines)))


def test_a_deeply_nested_file_ends(written):
    assert "not YAML" in (text := fault(written("a: " + "[" * 5000))) or "too deeply" in text


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("FORNO_SERVER__DRAIN_S", "5", "server.drain_s"),
        ("FORNO_MODELS__spam__BATCHING__MAX_ROWS", "8", "models.spam.batching.max_rows"),
        ("FORNO_MODELS__my__model__BATCHING__MAX_ROWS", "8", "models.my__model.batching.max_rows"),
        ("FORNO_TELEMETRY__OTLP_ENDPOINT", "", "telemetry.otlp_endpoint"),
        ("FORNO_MODELS__spam__LABELS__stable", "3", "models.spam.labels.stable"),
    ],
)
def test_the_environment_sets(name, value, path):
    found = load(environment={name: value}).model_dump(exclude_unset=True)
    for key in path.split("."):
        found = found[key]
    assert str(found).removesuffix(".0") == value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "FORNO_SERVER__ADRESS",
            "a:1",
            "FORNO_SERVER__ADRESS: server.adress is not a setting; did you mean `address`?",
        ),
        (
            "FORNO_SERVER__DRAIN_S",
            "x",
            "FORNO_SERVER__DRAIN_S: server.drain_s is 'x'; expected a number from 0 to 3600",
        ),
        (
            "FORNO_SERVER_DRAIN_S",
            "1",
            "FORNO_SERVER_DRAIN_S is not read; did you mean FORNO_SERVER__DRAIN_S (two underscores)?",
        ),
        (
            "FORNO_ADDRESS",
            "a:1",
            "FORNO_ADDRESS is not read; did you mean FORNO_SERVER__ADDRESS (two underscores)?",
        ),
        ("FORNO_SERVER__DRAIN_S", "[1", "FORNO_SERVER__DRAIN_S: not YAML: did not find expected ',' or ']'"),
    ],
)
def test_a_wrong_variable_is_named(name, value, expected):
    assert fault(environment={name: value}) == expected


def test_variables_that_others_set_are_left_alone():
    kubernetes = (
        "FORNO_SERVICE_HOST",
        "FORNO_PORT",
        "FORNO_PORT_8080_TCP",
        "FORNO_SERVER_PORT",
        "FORNO_DEBUG",
    )
    assert load(environment=dict.fromkeys(kubernetes, "tcp://10.0.0.1:8080")) == Config()


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("server.drain_s=5", ("server", "drain_s"), 5),
        ("models.v1.2.batching.max_rows=8", ("models", "v1.2", "batching", "max_rows"), 8),
        ("models.a.versions=[1, 2]", ("models", "a", "versions"), [1, 2]),
        ("models.a.labels.v1.2=3", ("models", "a", "labels", "v1.2"), 3),
        ("endpoints.spam/detect.input.codec=text", ("endpoints", "spam/detect", "input", "codec"), "text"),
        ("server.address=a=b", ("server", "address"), "a=b"),
    ],
)
def test_set_finds_its_setting(argument, path, value):
    override = parse_set(argument)
    assert (override.path, override.value) == (path, value)


@pytest.mark.parametrize("argument", ["server.drain_s", "=1", "server..drain_s=1", ""])
def test_set_without_key_or_value_is_refused(argument):
    with pytest.raises(ConfigError, match=r"expected KEY=VALUE, such as --set server\.drain_s=5"):
        parse_set(argument)


def test_a_model_file_is_overridden_setting_by_setting(written):
    file = written("batching: {max_rows: 8, max_delay_us: 5}", "model.yaml")
    override = load(environment={"FORNO_MODELS__a__BATCHING__MAX_ROWS": "16"}).models["a"]
    batching = load_model(file, override).batching
    assert (batching.max_rows, batching.max_delay_us) == (16, 5)


def test_a_model_file_has_no_path(written):
    file = written("path: x.onnx", "model.yaml")
    with pytest.raises(ConfigError, match=r"1: path is not for a model\.yaml: the model lies beside it"):
        load_model(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("[::1]:80", Address("::1", 80)),
        ("a.example:65535", Address("a.example", 65535)),
        ("unix:/run/a.sock", Address(path="/run/a.sock")),
        ("unix:a.sock", Address(path="a.sock")),
    ],
)
def test_addresses_are_read_and_written_alike(text, expected):
    assert Address.parse(text) == expected
    assert str(expected) == text


def test_an_absolute_socket_may_be_written_as_grpc_does():
    assert Address.parse("unix:///run/a.sock") == Address(path="/run/a.sock")


@pytest.mark.parametrize("text", ["", ":80", "a", "a:", "a:x", "a:-1", "a:65536", "::1:80", "a:\u0661", "[]:1"])
def test_other_addresses_are_refused(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["unix:", "unix:@abstract", "unix://host/a", "unix:a\0b", f"unix:/{'a' * 107}"])
def test_other_paths_of_sockets_are_refused(text):
    with pytest.raises(ValueError, match="unix:PATH"):
        Address.parse(text)


@given(st.data())
def test_one_wrong_letter_is_understood(data):
    *parents, word = data.draw(st.sampled_from(KEYS))
    typo = data.draw(st.sampled_from(sorted(slips(word))))
    beside = [path[-1] for path in KEYS if path[:-1] == (*parents,)]
    assume(typo not in beside)
    as_near = [name for name in beside if typo in slips(name)]  # "devics" is as near to `device` as to `devices`
    said = unknown(Config, (*parents, typo))
    assert word in as_near
    assert said.endswith(tuple(f"did you mean `{name}`?" for name in as_near))


def slips(word):
    """What becomes of a word by one letter less, more or other, or by two that change places."""
    cuts = [(word[:at], word[at:]) for at in range(len(word))]
    letters = string.ascii_lowercase + "_"
    return {
        *(left + right[1:] for left, right in cuts),
        *(left + letter + right for left, right in cuts for letter in letters),
        *(left + letter + right[1:] for left, right in cuts for letter in letters),
        *(left + right[:2][::-1] + right[2:] for left, right in cuts),
    } - {word, ""}


def test_names_far_from_all_have_no_nearest():
    assert nearest("zebra", ["address", "transport"]) is None
    assert nearest("Drain-S", ["drain_s"]) == "drain_s"


def test_every_setting_is_documented():
    found = {entry.path: entry for entry in entries()}
    assert {"server.drain_s", "models.NAME.batching.max_rows", "endpoints.NAME.model"} <= found.keys()
    for entry in found.values():
        assert entry.text, entry.path
        for suffix, unit in (("_us", "microseconds"), ("_s", "econds"), ("_bytes", "bytes")):
            if entry.path.endswith(suffix):
                assert unit in entry.text or unit == "bytes", entry.path
