"""Reads are bounded and name what is wrong; writes follow no link."""

import datetime
import json
import math
import os

import pytest

from easyaira import files
from easyaira.errors import ConfigError, StorageError, UnsafeInputError
from easyaira.generation import sets
from easyaira.storage import pretrained


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(ConfigError, match="found an empty text where a file or folder is named"):
        files.named_path("")
    with pytest.raises(ConfigError, match="is too long for the name of a file or folder"):
        pretrained.find("why? " * 60)


def test_write_replaces_links_and_leaves_their_targets(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "config.yaml"
    victim.write_text("mine")
    path.symlink_to(victim)
    (tmp_path / ".config.yaml.new").symlink_to(victim)
    files.write_file(path, "new")
    assert victim.read_text() == "mine"
    assert path.read_text() == "new" and not path.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "victim"]


def test_a_line_is_json_for_every_reader():
    """Python's NaN and lone surrogates are not; other programs would stop at them."""

    def refuse(constant):
        raise AssertionError(constant)

    day = datetime.date(2026, 1, 2)
    row = {"a": [float("nan"), -math.inf, 1.5], "b": {"c": "caf\ud83d é"}, "day": day}
    line = files.json_line(row)
    values = {"a": ["NaN", "-Infinity", 1.5], "b": {"c": "caf\ud83d é"}, "day": "2026-01-02"}
    assert json.loads(line.encode(), parse_constant=refuse) == values
    assert files.json_line({"c": "é"}) == '{"c": "é"}\n'
    assert files.json_line({"image": b"\xff\x00"}) == '{"image": "/wA="}\n'  # base64


def unreadable(tmp_path):
    """Files that nothing can be read from, with a part of the message."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    return {
        "pipe": "regular",
        "zero": "regular",
        "folder": "Is a directory",
        "absent": "No such file",
    }


def test_pipes_devices_and_folders_are_refused(tmp_path):
    for name, message in unreadable(tmp_path).items():
        with pytest.raises(ConfigError, match=message):
            files.read_json(tmp_path / name)


def test_large_files_are_refused(tmp_path):
    (tmp_path / "x").write_bytes(b" " * 101)
    with pytest.raises(ValueError, match="larger"):
        files.read_file(tmp_path / "x", 100)
    assert files.read_file(tmp_path / "x", 101) == b" " * 101


@pytest.mark.parametrize(
    "text, message",
    {
        b"": "not JSON",
        b'{"a": 1': "not JSON",
        b"[" * 200_000: "nested too deeply",
        b'{"a": 1, "b": {"c": 1, "c": 1}}': "'c' occurs twice",
        b'{"a": "\xff"}': "not UTF-8: byte 0xff at 7",
        b"[]": "holds a list, expected an object",
    }.items(),
)
def test_json_errors_name_the_file_and_what_is_wrong(text, message, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(StorageError, match=f"x.json: .*{message}.*; download it again") as error:
        files.read_json(tmp_path / "x.json", error=StorageError, hint="; download it again")
    assert "\n" not in str(error.value)


LAUGHS = (
    "a0: &a0 ["
    + "lol, " * 10
    + "]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
)


@pytest.mark.parametrize(
    "text, message",
    {
        "": "expected options",
        "- 1": "expected options as `name: value`, found a list",
        "a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n": "line 5: the key 'c' is set in line 3, too",
        "a: [1\nb: 2": "line 2: ",
        "a: !!python/object/apply:os.system [x]": "line 1: could not determine a constructor",
        "a: &a [*a]": "line 1: an alias contains itself",
        "a: 1\nseed: 0123": "line 2: YAML reads 0123 as 83; write that, or quote it",
        "a: [-010]": "line 1: YAML reads -010 as -8",
        "a: 1:30": "line 1: YAML reads 1:30 as 90",
        LAUGHS: "values with its aliases written out",
        "a: " + "[" * 100_000: "nested too deeply",
    }.items(),
    ids=str,
)
def test_yaml_errors_name_the_line(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        files.read_yaml(tmp_path / "x.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_yaml_takes_other_numbers_and_texts_with_zeros_and_colons(tmp_path):
    (tmp_path / "x.yaml").write_text("a: [0, 0.5, 0x1F, 1_000, '010', 'a:b', 08, 1e-5, 00:x]")
    values = [0, 0.5, 31, 1000, "010", "a:b", "08", "1e-5", "00:x"]
    assert files.read_yaml(tmp_path / "x.yaml") == {"a": values}


def test_yaml_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="x.yaml: cannot be read: not UTF-8: byte 0xe9 at 3"):
        files.read_yaml(tmp_path / "x.yaml")


def test_yaml_takes_aliases_merges_and_a_byte_order_mark(tmp_path):
    (tmp_path / "x.yaml").write_text("\ufeffa: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n")
    a = {"x": 1, "y": 2}
    assert files.read_yaml(tmp_path / "x.yaml") == {"a": a, "b": {"x": 1, "y": 3}, "c": [a, a]}


def linked(tmp_path, name, target):
    """A model folder with a link in it."""
    folder = tmp_path / "models--a--b/snapshots/c0ffee"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    link, target = folder / name, tmp_path / target
    for file in (link, target):
        file.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("text")
    link.symlink_to(target)
    return folder


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "additional_chat_templates/tool.jinja", "tokenizer.json", "merges.txt"],
)
def test_a_link_out_of_a_model_folder_is_refused(name, tmp_path):
    folder = linked(tmp_path, name, "secret")
    with pytest.raises(UnsafeInputError, match=f"{name}: is a link to {tmp_path}/secret, outside"):
        pretrained.find(str(folder))
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run/tokenizer")
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    with pytest.raises(UnsafeInputError, match=name):
        pretrained.find(f"{tmp_path}/run/checkpoints/3")


@pytest.mark.parametrize(
    "name, target",
    [
        ("tokenizer.json", "models--a--b/snapshots/c0ffee/original.json"),
        ("tokenizer.json", "models--a--b/blobs/0123abcd"),  # as the hub's cache is laid out
        ("model.safetensors", "elsewhere/model.safetensors"),  # weights are no text
        ("notes.md", "elsewhere/notes"),  # is not read
    ],
)
def test_links_that_stay_inside_or_hold_weights_are_followed(name, target, tmp_path):
    folder = linked(tmp_path, name, target)
    assert pretrained.find(str(folder)).folder == folder
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert pretrained.find(str(tmp_path / "link")).step is None


def test_the_place_of_checkpoints_that_lie_elsewhere_is_told(tmp_path, capsys):
    run, place = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (run / "config.yaml").write_text(f"provenance: {{}}\ncheckpoint_dir: {place}\n")
    for _ in range(2):
        assert pretrained.find(f"{run}/checkpoints/4").step == 4
    message = f"{run}/checkpoints/4: checkpoints are read from {place}\n"
    assert capsys.readouterr() == ("", message)


def test_sets_are_not_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a.jsonl.new").symlink_to(victim)
    with sets.new_sets(tmp_path, ["a.jsonl"]) as put:
        put("a.jsonl", {"x": 1})
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.jsonl").read_text() == '{"x": 1}\n'
