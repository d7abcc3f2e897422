"""Folders and patterns: which files are data, and of which split; nothing outside is read."""

import json
import os
import time
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from easyaira.config.data import Source
from easyaira.data import sources
from easyaira.errors import DataError, UnsafeInputError
from helpers import tiny


def names(path, split="train"):
    """The files whose rows are read, by the text that `write` gave them."""
    return [located.row["n"] for located in sources.read(Source(str(path), split))]


def write(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.write_rows(folder / name, [{"n": name}])


def readme(folder, *lines):
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", "# Data"]))


def refused(path, split="train", error=DataError):
    with pytest.raises(error) as raised:
        names(path, split)
    message = str(raised.value)
    assert "\n" not in message
    return message


SPLITS = {
    "words": {"train.jsonl": "train", "test.jsonl": "test", "dev.jsonl": "validation"},
    "more words": {"training.jsonl": "train", "my_eval.jsonl": "test", "val-2.jsonl": "validation"},
    "shards": {
        "data/train-00000-of-00002.jsonl": "train",
        "data/train-00001-of-00002.jsonl": "train",
        "data/test-00000-of-00001.jsonl": "test",
    },
    "languages": {
        "data/english-00000-of-00001.jsonl": "english",
        "data/portuguese-00000-of-00001.jsonl": "portuguese",
    },
    "folders": {"train/a.jsonl": "train", "test/a.jsonl": "test", "test/b.jsonl": "test"},
    "a word in a word": {"trainer_testimony.jsonl": "train", "latest.jsonl": "train"},
    "ours": {"dpo_held_out.jsonl": "validation", "held_out.jsonl": "validation"}
    | {"train.jsonl": "train"},
    "others": {"a.jsonl": "train", "b.jsonl": "train", "test.jsonl": "test"},
}  # fmt: skip


@pytest.mark.parametrize("kind", SPLITS)
def test_only_the_files_of_a_split_are_read(kind, tmp_path):
    write(tmp_path, *SPLITS[kind])
    for split in set(SPLITS[kind].values()):
        assert names(tmp_path, split) == sorted(n for n, s in SPLITS[kind].items() if s == split)
    if "train" not in SPLITS[kind].values():
        assert "no split 'train'; set data.split to one of english, portuguese" in refused(tmp_path)


def test_a_split_that_is_not_there_is_an_error(tmp_path):
    write(tmp_path, "train.jsonl", "test.jsonl")
    assert "no split 'dev'; set data.split to one of test, train" in refused(tmp_path, "dev")
    write(tmp_path / "plain", "a.jsonl")
    assert "has no splits; leave out split 'test'" in refused(tmp_path / "plain", "test")


def test_a_readme_says_which_files_are_read(tmp_path):
    write(tmp_path, "data/train-a.jsonl", "data/train-b.jsonl", "held.jsonl", "other.jsonl")
    readme(
        tmp_path,
        "- config_name: default",
        "  data_files:",
        "  - {split: train, path: data/train-*}",
        "  - {split: test, path: [held.jsonl]}",
    )
    assert names(tmp_path) == ["data/train-a.jsonl", "data/train-b.jsonl"]
    assert names(tmp_path, "test") == ["held.jsonl"]
    assert "no split 'dev'; set data.split to one of train, test" in refused(tmp_path, "dev")
    readme(tmp_path, "- config_name: x", "  data_files: other.jsonl")
    assert names(tmp_path) == ["other.jsonl"]
    readme(tmp_path, "- {config_name: x}", "- {config_name: y}")
    assert "has the configurations x, y" in refused(tmp_path)
    (tmp_path / "README.md").write_text("# no configs\n---\n")
    assert names(tmp_path) == ["held.jsonl", "other.jsonl"]


@pytest.mark.parametrize("path", ["../out.jsonl", "/etc/*.jsonl", "a/../../out.jsonl"])
def test_a_readme_does_not_lead_out_of_its_folder(path, tmp_path):
    write(tmp_path, "in/a.jsonl", "out.jsonl")
    readme(tmp_path / "in", "- config_name: x", f"  data_files: {path}")
    assert "leads out of the folder" in refused(tmp_path / "in", error=UnsafeInputError)


@pytest.mark.parametrize(
    "configs", ["- 3", "  x: 3", "- {data_files: [{path: a}]}", "- {data_files: 3}"]
)
def test_a_damaged_readme_is_one_line(configs, tmp_path):
    write(tmp_path, "a.jsonl")
    readme(tmp_path, configs)
    assert "README.md: configs: expected config_name and data_files" in refused(tmp_path)


def test_files_that_hold_no_rows_are_left_out(tmp_path):
    write(tmp_path, "a.jsonl")
    for name in ("._a.jsonl", "_b.jsonl", ".c.jsonl", "dataset_info.json", "dataset_infos.json"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert names(tmp_path) == ["a.jsonl"]


def test_a_pattern_is_a_sorted_list_of_files(tmp_path):
    write(tmp_path, "b.jsonl", "a.jsonl", "c.json5", "in/d.jsonl")
    (tmp_path / "._b.jsonl").write_bytes(b"\0")
    assert names(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "**/[d]*") == ["in/d.jsonl"]
    assert "no data file matches" in refused(tmp_path / "*.csv")
    write(tmp_path, "test-1.jsonl", "test-2.jsonl")
    assert names(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "*.jsonl", "test") == ["test-1.jsonl", "test-2.jsonl"]
    assert names(tmp_path / "test-*") == ["test-1.jsonl", "test-2.jsonl"]  # asked for


# Hostile and damaged input


def test_a_saved_data_set_stays_in_its_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("mine", "other"):
        rows = datasets.Dataset.from_list([{"n": name}])
        datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / name)
    state = tmp_path / "mine/train/state.json"
    own = json.loads(state.read_text())
    away = tmp_path / "other/train/data-00000-of-00001.arrow"
    for file in ("../../other/train/data-00000-of-00001.arrow", str(away)):
        state.write_text(json.dumps(own | {"_data_files": [{"filename": file}]}))
        assert "lies outside the folder" in refused(tmp_path / "mine", error=UnsafeInputError)
    state.write_text(json.dumps(own))
    assert names(tmp_path / "mine") == ["mine"]
    (tmp_path / "mine/train/data-00000-of-00001.arrow").unlink()
    (tmp_path / "mine/train/data-00000-of-00001.arrow").symlink_to(away)
    assert "lies outside the folder" in refused(tmp_path / "mine", error=UnsafeInputError)
    (tmp_path / "mine/dataset_dict.json").write_text('{"splits": ["train", "../other/train"]}')
    outside = refused(tmp_path / "mine", "../../other/train")
    assert "set data.split to one of" in outside
    assert "outside" in refused(tmp_path / "mine", "../other/train", UnsafeInputError)
    for damaged in ("", "[]", "{" * 9):
        (tmp_path / "mine/dataset_dict.json").write_text(damaged)
        assert "dataset_dict.json: " in refused(tmp_path / "mine")


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.jsonl", "pi*.jsonl"):
        assert "regular file" in refused(tmp_path / name) or "*" in name
    assert "no data file" in refused(tmp_path)


@pytest.mark.parametrize(
    "name, content, fix",
    [
        ("a.jsonl", b"\x1f\x8b\x08\x00", "is gzip; name it .jsonl.gz"),
        ("a.json", b"\x1f\x8b\x08\x00", "is gzip; name it .jsonl.gz"),
        ("a.csv", b"PK\x03\x04", "is a zip archive; unpack it"),
        ("a.jsonl", b'[{"n": 1}]', "is one JSON list, not one object per line; name it .json"),
        (
            "a.jsonl",
            b' [\n  {"n": 1}\n]',
            "is one JSON list, not one object per line; name it .json",
        ),
        ("a.jsonl", b"PAR1", "is Parquet; name it .parquet"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd", "is Zstandard; decompress it"),
    ],
)
def test_a_file_of_another_format_is_named(name, content, fix, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name) == f"{tmp_path / name}: {fix}"


def test_a_key_that_stands_twice_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": "a", "m": {"x": 1, "x": 2}}\n{"n": "b"}\n')
    first, second = sources.read(Source(str(tmp_path / "a.jsonl")))
    assert first.row == sources.BadRow("not JSON: the key 'x' occurs twice in one object")
    assert second.row == {"n": "b"}
    (tmp_path / "a.json").write_text('[{"n": "a", "n": "b"}]')
    assert "a.json:1: not JSON: the key 'n' occurs twice" in refused(tmp_path / "a.json")


def _dictionary(length, rows):
    texts = pyarrow.array(["a" * length])
    index = pyarrow.array([0] * rows, pyarrow.int32())
    return pyarrow.table({"n": pyarrow.DictionaryArray.from_arrays(index, texts)})


def _write_parquet(table, path):
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _write_plain_parquet(table, path):
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)


def _write_arrow(table, path):
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def test_a_time_beyond_pythons_is_named(tmp_path):
    table = pyarrow.table({"n": ["a"], "t": pyarrow.array([2**62], pyarrow.timestamp("us"))})
    _write_parquet(table, tmp_path / "a.parquet")
    reason = "cannot be read: date value out of range; leave its column out"
    assert refused(tmp_path / "a.parquet") == f"{tmp_path / 'a.parquet'}: {reason}"


@pytest.mark.parametrize(
    "name, save",
    [("a.parquet", _write_parquet), ("b.parquet", _write_plain_parquet), ("a.arrow", _write_arrow)],
)
@pytest.mark.slow
def test_a_long_text_that_stands_in_every_row_is_not_held_once_a_row(name, save, tmp_path):
    """A bomb: 4 GB in a few kB, or in 8 MB."""
    save(_dictionary(2**23, 500), tmp_path / name)
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        count = started = 0
        started = time.monotonic()
        for located in sources.read(Source(str(tmp_path / name))):
            assert len(located.row["n"]) == 2**23
            count += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 500
    assert peak < 200 * 2**20
    assert pyarrow.default_memory_pool().max_memory() - before < 200 * 2**20
    assert time.monotonic() - started < 60
