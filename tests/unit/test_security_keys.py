"""The keys file and the command over it."""

from __future__ import annotations

import threading

import pytest

from forno.server.__main__ import main
from forno.server.errors import ConfigError
from forno.server.security import keys


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.yaml"


def test_a_key_is_kept_as_a_hash_alone(file):
    key = keys.add(file, "web", ["predict"])
    assert file.stat().st_mode & 0o777 == 0o600
    assert key.removeprefix("forno_").partition("_")[2] not in file.read_text()
    key_id, entry = keys.find(keys.read(file), key)
    assert (key_id, entry.name, entry.scopes) == (key[6:14], "web", ("predict",))
    assert keys.find(keys.read(file), key + "x") is None


def test_keys_made_at_once_are_all_there(file):
    threads = [threading.Thread(target=keys.add, args=(file, f"n{number}", ["predict"])) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.name for entry in keys.read(file).values()) == sorted(f"n{number}" for number in range(20))
    assert [path.name for path in file.parent.iterdir()] == ["keys.yaml"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "keys is missing"),
        ("keys: {a: {}}", "keys.a.name is missing"),
        ("keys: {a: {name: x, sha256: 12, scopes: []}}", "keys.a.sha256 is 12"),
        (f"keys: {{a: {{name: x, sha256: {'0' * 63}a, scopes: [all]}}}}", "'all' is not a scope"),
        (f"keys: {{a: {{name: x, sha256: {'0' * 63}a, scopes: [], expires: soon}}}}", "keys.a.expires is 'soon'"),
        (f"keys: {{a: {{name: x, sha256: {'0' * 63}a, scopes: [], scope: 1}}}}", "did you mean `scopes`"),
    ],
)
def test_faults_in_the_file_are_told(file, text, told):
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.yaml") as error:
        keys.read(file)
    assert told in str(error.value)


def test_the_command_makes_lists_and_removes(file, capsys):
    given = ["--file", str(file)]
    add = ["keys", "add", "--name", "web", "--scope", "predict:model/spam"]
    assert main([*add, *given, "--expires-days", "90", "--calls-per-s", "5"]) == 0
    key = capsys.readouterr().out.strip()
    key_id, entry = keys.find(keys.read(file), key)
    assert entry.calls_per_s == 5
    assert main(["keys", "list", *given]) == 0
    assert capsys.readouterr().out == f"{key_id}  web  until {entry.expires}  predict:model/spam\n"
    assert main(["keys", "remove", "web", *given]) == 0
    assert capsys.readouterr().out == f"removed {key_id}\n"
    assert main(["keys", "remove", "web", *given]) == 1
    assert keys.read(file) == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["add"], "keys add takes --name NAME"),
        (["add", "web"], "did you mean --name web?"),
        (["add", "--name", "web"], "at least one --scope"),
        (["add", "--name", "web", "--scope", "all"], "--scope: 'all' is not a scope; expected `*`"),
        (["add", "--name", "web", "--scope", "predict", "--expires-days", "0"], "--expires-days is 0"),
        (["add", "--name", "web", "--scope", "predict", "--calls-per-s", "0"], "--calls-per-s is 0"),
        (["remove"], "the id or the name"),
        (["list"], "cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong(file, capsys, words, told):
    assert main(["keys", *words, "--file", str(file)]) == 2
    assert told in capsys.readouterr().err
    assert not file.exists()
