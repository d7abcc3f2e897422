"""Rows of every kind of file: the same ones, an error with its place, or a drop that is counted."""

import csv
import gzip
import inspect
import io
import json
import sys
import tempfile
import tracemalloc
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from easyaira.config.algorithms import SFTConfig
from easyaira.config.data import DataConfig, Source
from easyaira.data import cache, dataset, formats, sources
from easyaira.data import columns as data_columns
from easyaira.data.recipe import recipe_of
from easyaira.data.sources import BadRow
from easyaira.data.template import Template
from easyaira.errors import DataError
from helpers import tiny

ROWS = [{"prompt": "a?", "completion": "NA"}, {"prompt": "b, \u2028 c?", "completion": "007"}]
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "a?"), ("assistant", "b"), ("assistant", "c"))
)


@lru_cache
def plain():
    return Template(tiny.tokenizer(), "plain", "gpt2")


def load(path, *, task="conversation", **config):
    train = path if isinstance(path, list) else str(path)
    settings = DataConfig(train=train, **{"template": "plain"} | config)
    recipe = recipe_of(task, settings, 64, SFTConfig() if task == "conversation" else None)
    return dataset.load(settings, recipe, template=plain(), vocab_size=tiny.VOCAB, seed=0)


def rows_of(path, *settings, **named):
    return [located.row for located in sources.read(Source(str(path), *settings, **named))]


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows, **options):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content, **options)
    return content.getvalue()


def as_arrow(rows, new=pyarrow.ipc.new_stream):
    content, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with new(content, table.schema) as writer:
        writer.write_table(table)
    return content.getvalue()


def as_jsonl(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def as_gzip(content):
    return gzip.compress(content, mtime=0)


KINDS = {
    "a.jsonl": as_jsonl,
    "a.jsonl.gz": lambda rows: as_gzip(as_jsonl(rows)),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "a.csv": as_csv,
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "file.arrow": lambda rows: as_arrow(rows, pyarrow.ipc.new_file),
}


def cases(*cases):
    """Cases under the names that stand first."""
    return [pytest.param(*values, id=name) for name, *values in cases]


def error_of(path, **config):
    """The one line of the error that `load` ends with."""
    with pytest.raises(DataError) as error:
        load(path, **config)
    message = str(error.value)
    assert "\n" not in message and message.isprintable()
    return message


# What is read


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    (tmp_path / name).write_bytes(KINDS[name](ROWS))
    assert rows_of(tmp_path / name) == ROWS


def test_a_folder_gives_the_rows_of_its_data_files_in_their_order(tmp_path):
    for number, name in enumerate(KINDS):
        (tmp_path / name).write_bytes(KINDS[name]([{"n": str(number)}]))
    (tmp_path / "readme.md").write_text("no data")
    order = [str(list(KINDS).index(name)) for name in sorted(KINDS)]
    assert [row["n"] for row in rows_of(tmp_path)] == order
    places = [located.place for located in sources.read(Source(str(tmp_path)))]
    first = {name: 2 if name == "a.csv" else 1 for name in sorted(KINDS)}
    assert places == [f"{tmp_path / name}:{number}" for name, number in first.items()]


def test_a_folder_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    parts = {
        "train": datasets.Dataset.from_list(ROWS[:1]),
        "test": datasets.Dataset.from_list(ROWS),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "many")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "many", "test") == ROWS
    assert rows_of(tmp_path / "many") == ROWS[:1]
    assert "no split 'dev'; set data.split to one of" in error_of(tmp_path / "many", split="dev")
    assert "has no splits" in error_of(tmp_path / "one", split="dev")


@pytest.mark.parametrize(
    "name, content",
    cases(
        ("BOM in jsonl", "a.jsonl", b"\xef\xbb\xbf" + as_jsonl(ROWS)),
        ("BOM in jsonl.gz", "a.jsonl.gz", as_gzip(b"\xef\xbb\xbf" + as_jsonl(ROWS))),
        ("BOM in json", "a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("BOM in csv", "a.csv", b"\xef\xbb\xbf" + as_csv(ROWS)),
        ("CRLF in jsonl", "a.jsonl", as_jsonl(ROWS, "\r\n")),
        ("CRLF in json", "a.json", json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode()),
        ("LF in csv", "a.csv", as_csv(ROWS).replace(b"\r\n", b"\n")),
        ("no end of the last line", "a.jsonl", as_jsonl(ROWS)[:-1]),
        ("blank lines in jsonl", "a.jsonl", b"\n" + as_jsonl(ROWS, "\n \n")),
        ("blank lines in csv", "a.csv", as_csv(ROWS) + b"\r\n\r\n"),
    ),
)
def test_what_is_no_text_is_not_in_the_text(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize("cell", ["NA", "null", "None", "nan", "007", "1e3", "", " x ", 'a "b"\nc'])
def test_a_cell_stays_the_text_it_is(cell, tmp_path):
    rows = [{"prompt": cell, "completion": cell}]
    (tmp_path / "a.csv").write_bytes(as_csv(rows))
    assert rows_of(tmp_path / "a.csv") == rows


def test_a_list_larger_than_the_window_is_read_whole(tmp_path):
    rows = [{"prompt": str(i), "completion": "é" * (i % 7) * 40_000} for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert (tmp_path / "a.json").stat().st_size > 3 * 2**20
    assert rows_of(tmp_path / "a.json") == rows


def test_a_list_of_rows_just_below_the_limit_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ROW_BYTES", 4 * 2**20)
    rows = [{"text": "x" * 3_670_000}] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert rows_of(tmp_path / "a.json") == rows


@pytest.mark.slow
@pytest.mark.parametrize("ending", [b"", b"\n"], ids=["cut", "whole"])
def test_no_row_above_the_limit_is_held_in_memory(ending, tmp_path):
    """A bomb: 300 MB in 300 kB."""
    piece = as_gzip(b"a" * 10 * 2**20)
    after = as_gzip(ending + as_jsonl(ROWS)) if ending else b""
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(as_gzip(as_jsonl(ROWS) + b'{"prompt": "') + piece * 30 + after)
    assert file.stat().st_size < 400_000
    tracemalloc.start()
    try:
        rows = list(sources.read(Source(str(file))))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 300 * 2**20
    assert rows[2] == (f"{file}:3", BadRow("longer than 64 MiB"))
    assert [row for _, row in rows[:2] + rows[3:]] == (ROWS * 2 if ending else ROWS)
    assert [place for place, _ in rows[3:]] == [f"{file}:{n}" for n in (4, 5) if ending]


# Rows that cannot be read

FINE = b'{"prompt": "a?", "completion": "b"}\n'
BAD_LINES = cases(
    ("broken", b'{"prompt": "a?", "compl\n', "not JSON"),
    ("two rows in a line", FINE[:-1] * 2 + b"\n", "not JSON: Extra data"),
    ("Latin-1", '{"prompt": "é", "completion": "b"}\n'.encode("latin-1"), "not UTF-8: byte 0xe9"),
    (
        "lone surrogate",
        b'{"prompt": "a\\ud800", "completion": "b"}\n',
        "column prompt: wanted text.*lone surrogate at 1",
    ),
    ("null", b'{"prompt": "a?", "completion": null}\n', "column completion.*found null"),
    ("number", b'{"prompt": 3, "completion": "b"}\n', "column prompt: wanted text.*found a number"),
    (
        "list of texts",
        b'{"prompt": ["a"], "completion": "b"}\n',
        "column prompt: a message must be",
    ),
    ("object", b'{"prompt": "a", "completion": {"a": 1}}\n', "column completion.*found an object"),
    (
        "null in a message",
        b'{"prompt": [{"role": "user", "content": null}], "completion": "b"}\n',
        "column prompt: wanted text as content, found null",
    ),
    ("a list as a row", b'["a", "b"]\n', "a row must be an object with columns, found a list"),
    ("a text as a row", b'"prompt"\n', "a row must be an object with columns, found a text"),
    ("null as a row", b"null\n", "a row must be an object with columns, found null"),
    ("another schema", b'{"messages": []}\n', "no column prompt, which earlier rows have"),
    ("no columns", b"{}\n", "no column prompt, which earlier rows have"),
    (
        "3,000 nested lists",
        b'{"prompt": "a", "completion": ' + b"[" * 3000 + b"]" * 3000 + b"}\n",
        "nested too deeply|column completion",
    ),
    (
        "6,000 digits",
        b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 6000 + b"}\n",
        "not JSON: .*6000 digits",
    ),
)


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_line_is_an_error_or_a_counted_drop(line, reason, tmp_path):
    file, fine = tmp_path / "a.jsonl", tmp_path / "fine.jsonl"
    fine.write_bytes(FINE * 2)
    file.write_bytes(FINE + line + FINE + line)
    pytest.raises(DataError, load, file).match(rf"^{file}:2: .*({reason})")
    assert "data.on_bad_row" in error_of(file)
    data = load(file, on_bad_row="skip", max_dropped=0.5)
    report = data.report["train"]
    assert (report["read"], report["kept"], report["dropped"]) == (4, 2, {"unreadable": 2})
    assert report["first_dropped"] == {"unreadable": f"{file}:2"}
    assert data.train.rows.tolist() == [0, 2]
    np.testing.assert_array_equal(data.train.tokens, load(fine).train.tokens)


@pytest.mark.parametrize(
    "name, content, place, reason",
    cases(
        ("cut last line", "a.jsonl", (FINE * 3)[:-9], 3, "not JSON"),
        ("cut last line, gz", "a.jsonl.gz", as_gzip((FINE * 3)[:-9]), 3, "not JSON"),
        (
            "a number in a list",
            "a.json",
            b'[{"prompt": "a", "completion": "b"}, 3]',
            2,
            "found a number",
        ),
        (
            "too few cells",
            "a.csv",
            b"prompt,completion\na,b\nc\nd,e\n",
            3,
            "1 cells, but the first",
        ),
        (
            "too many cells",
            "a.csv",
            b"prompt,completion\na,b\nc,d,e\n",
            3,
            "3 cells, but the first",
        ),
        ("Latin-1 cell", "a.csv", b"prompt,completion\na,b\n\xe9,c\n", 3, "not UTF-8"),
        (
            "semicolon in a row",
            "a.csv",
            b"prompt,completion\na,b\nc;d\n",
            3,
            "1 cells, but the first",
        ),
        (
            "null in parquet",
            "a.parquet",
            as_parquet([ROWS[0], {"prompt": "a", "completion": None}]),
            2,
            "column completion: .*found null",
        ),
        (
            "number in arrow",
            "a.arrow",
            as_arrow([{"prompt": [], "completion": "a"}, {"prompt": [3], "completion": "b"}]),
            2,
            "column prompt: a message must be",
        ),
    ),
)
def test_a_bad_row_of_any_file_is_an_error_or_a_counted_drop(
    name, content, place, reason, tmp_path
):
    file = tmp_path / name
    file.write_bytes(content)
    if name != "a.arrow":
        pytest.raises(DataError, load, file).match(rf"^{file}:{place}: .*{reason}")
        error_of(file)
    report = load(file, on_bad_row="skip", max_dropped=0.5).report["train"]
    assert report["read"] == report["kept"] + report["dropped"]["unreadable"]
    assert report["dropped"] == {"unreadable": 1} and report["kept"] > 0
    assert report["first_dropped"] == {"unreadable": f"{file}:{place}"}


def test_the_place_is_the_line_that_an_editor_shows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + FINE + b"\r\n \n{broken\n")
    assert error_of(tmp_path / "a.jsonl").startswith(f"{tmp_path / 'a.jsonl'}:5: ")
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\n"a\nb",c\n\nd\n')
    assert error_of(tmp_path / "a.csv").startswith(f"{tmp_path / 'a.csv'}:5: ")


# Files that cannot be read

MANY = [{"prompt": f"{i}?", "completion": "x" * 50} for i in range(300)]
CHECKED = as_parquet(
    MANY,
    write_page_checksum=True,
    compression="none",
    use_dictionary=False,
    write_statistics=False,
)
GZ = as_gzip(FINE * 9)


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGED = cases(
    ("missing column", "a.jsonl", b'{"prompt": "a"}\n', ":1: found columns prompt; wanted "),
    ("unknown columns", "a.jsonl", b'{"x": "a", "y": 1}\n', ":1: found columns x, y; wanted "),
    ("UTF-16 jsonl", "a.jsonl", FINE.decode().encode("utf-16"), ": is UTF-16; save it as UTF-8"),
    ("UTF-16 jsonl.gz", "a.jsonl.gz", as_gzip(FINE.decode().encode("utf-16")), ": is UTF-16"),
    ("UTF-16 json", "a.json", "[]".encode("utf-16"), ": cannot be read: .utf-8.*0xff"),
    ("Latin-1 json", "a.json", '[{"x": "é"}]'.encode("latin-1"), ": cannot be read: .utf-8.*0xe9"),
    ("empty jsonl", "a.jsonl", b"", ": no rows"),
    ("blank jsonl", "a.jsonl", b"\n \n", ": no rows"),
    ("empty jsonl.gz", "a.jsonl.gz", as_gzip(b""), ": no rows"),
    ("nothing in jsonl.gz", "a.jsonl.gz", b"", ": is empty"),
    ("empty csv", "a.csv", b"", ": no rows"),
    ("only a header", "a.csv", b"prompt,completion\n", ": no rows"),
    ("empty list", "a.json", b" [ ] ", ": no rows"),
    ("empty json", "a.json", b"", ": no rows"),
    ("empty parquet", "a.parquet", b"", ": is empty"),
    ("empty arrow", "a.arrow", b"", ": cannot be read"),
    (
        "an object in json",
        "a.json",
        b'{"prompt": "a"}',
        ": wanted a list of rows .*; save the list alone",
    ),
    ("semicolons", "a.csv", b"prompt;completion\na;b,c\n", ": columns are separated by ';'"),
    ("lines in json", "a.json", FINE * 2, ": wanted a list.*name it .jsonl, for one object a line"),
    ("broken item", "a.json", b"[" + FINE + b', {"prompt": a}, ' + FINE + b"]", ":2: not JSON"),
    ("list without its end", "a.json", b"[" + FINE + b"," + FINE, ":3: not JSON"),
    ("list that is cut", "a.json", b"[" + FINE + b"," + FINE[:-9], ":2: not JSON"),
    ("cut number", "a.json", b"[" + FINE + b", 3", ":2: not JSON"),
    ("nested json", "a.json", b"[" + b"[" * 3000, ":1: not JSON"),
    ("6,000 digits", "a.json", b"[" + FINE + b"," + b"9" * 6000 + b"]", ":2: not JSON.*digits"),
    ("unclosed quote", "a.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', ":4: not CSV"),
    ("text after a quote", "a.csv", b'prompt,completion\n"a"b,c\n', ":2: not CSV"),
    ("semicolons", "a.csv", b"prompt;completion\na;b\n", ":2: found columns prompt;completion;"),
    ("no header", "a.csv", b"a?,b\nc?,d\n", r":2: found columns a\?, b; wanted"),
    ("a header twice", "a.csv", b"prompt,prompt\na,b\n", ":1: a column name occurs twice"),
    ("cut gzip", "a.jsonl.gz", GZ[:-9], ": cannot be read.*may be cut off"),
    ("bad CRC", "a.jsonl.gz", flipped(GZ, len(GZ) - 8), ": cannot be read: CRC check failed"),
    ("bad length", "a.jsonl.gz", flipped(GZ, len(GZ) - 1), ": cannot be read"),
    ("bad deflate", "a.jsonl.gz", flipped(GZ, 11), "(: cannot be read|:1: not JSON)"),
    ("no gzip", "a.jsonl.gz", FINE, ": is not gzip; name it without .gz"),
    ("no parquet", "a.parquet", b"PAR1xxxx", ": cannot be read"),
    ("cut footer", "a.parquet", CHECKED[:-20], ": cannot be read"),
    ("flipped prompt", "a.parquet", flipped(CHECKED, CHECKED.index(b"99?")), ": cannot.* CRC"),
    ("flipped answer", "a.parquet", flipped(CHECKED, CHECKED.rindex(b"xxx")), ": cannot.* CRC"),
    ("cut arrow stream", "a.arrow", as_arrow(MANY)[:-500], ": cannot be read"),
    ("cut arrow file", "a.arrow", as_arrow(MANY, pyarrow.ipc.new_file)[:-30], ": cannot be read"),
    ("unknown file format", "a.txt", b"x", ": unknown file format; wanted .jsonl"),
)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("name, content, message", DAMAGED)
def test_a_damaged_file_is_an_error_with_its_place(name, content, message, on_bad_row, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^{tmp_path / name}{message}"):
        load(tmp_path / name, on_bad_row=on_bad_row, max_dropped=0.99)
    error_of(tmp_path / name, on_bad_row=on_bad_row, max_dropped=0.99)


def test_a_link_to_nowhere_is_named(tmp_path):
    """It was looked for on the hub, for half a minute."""
    (tmp_path / "link").symlink_to("nowhere")
    assert "link: is a link to nowhere, which does not exist" in error_of(tmp_path / "link")


def test_nothing_of_a_damaged_file_is_kept_for_later(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(GZ[:-9])
    for _ in range(2):
        error_of(tmp_path / "a.jsonl.gz")
    assert not list(cache.cache_root().glob("tokens/*"))


def test_files_without_rows(tmp_path):
    schema = pyarrow.schema({"prompt": pyarrow.string(), "completion": pyarrow.string()})
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "a.parquet")
    assert (
        error_of(tmp_path / "a.parquet")
        == f"{tmp_path / 'a.parquet'}: no rows; is it the right file?"
    )
    (tmp_path / "folder").mkdir()
    assert "no data file in this folder; wanted .jsonl" in error_of(tmp_path / "folder")


@pytest.mark.parametrize("path", ["nothing.jsonl", "./data", "/nowhere/data", "a/b/c", "~/nowhere"])
def test_a_path_that_does_not_exist(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error_of(path) == f"{path}: no such file or folder; check the path"


@pytest.mark.parametrize(
    "name, content",
    cases(
        ("after a list", "a.json", b'[{"prompt": "a", "completion": "b"}][{"prompt": "c"}]'),
        (
            "arrow cut between batches",
            "a.arrow",
            as_arrow(ROWS)[:-8],
        ),
    ),
)
def test_no_row_is_lost_without_a_word(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    error_of(tmp_path / name)


@pytest.mark.parametrize(
    "name, content",
    cases(
        ("UTF-16 csv", "a.csv", "prompt,completion\na,b\n".encode("utf-16")),
        ("Latin-1 header", "a.csv", b"prompt\xe9,completion\na,b\n"),
        ("surrogate in a name", "a.jsonl", b'{"prompt\\ud800": "a"}'),
        ("new line in a name", "a.jsonl", b'{"prompt\\n": "a"}'),
    ),
)
def test_whatever_a_column_is_called_the_error_is_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    error_of(tmp_path / name)


def test_a_column_that_is_there_twice_is_an_error_in_parquet_too(tmp_path):
    columns = [pyarrow.array([text]) for text in "abc"]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    error_of(tmp_path / "a.parquet")


def test_a_folder_called_like_a_file_is_none(tmp_path):
    tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(3))
    (tmp_path / "old.jsonl").mkdir()
    assert load(tmp_path).report["train"]["kept"] == 3


# Hub data sets


@pytest.fixture
def hub(monkeypatch):
    """`hub.calls` are the arguments of datasets.load_dataset, which gives `hub.rows`."""
    datasets = pytest.importorskip("datasets")
    signature = inspect.signature(datasets.load_dataset)

    class Hub:
        calls, rows = [], tiny.sft_rows(5)

    def load_dataset(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        Hub.calls.append((call["path"], call["name"], call["split"], call["streaming"]))
        if isinstance(Hub.rows, Exception):
            raise Hub.rows
        return iter(Hub.rows) if call["streaming"] else datasets.Dataset.from_list(Hub.rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return Hub


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
def test_a_hub_data_set_is_asked_for_by_its_id_and_split(streaming, hub):
    data = load([Source("owner/data", "test", streaming=streaming, subset="sub")])
    assert set(hub.calls) == {("owner/data", "sub", "test", streaming)}
    assert data.report["train"]["kept"] == data.report["train"]["read"] == 5
    places = [located.place for located in sources.read(Source("owner/data", streaming=streaming))]
    assert places == [f"owner/data:{n}" for n in range(1, 6)]


def test_what_is_streamed_has_no_key_and_is_read_again(hub):
    source = Source("owner/data", streaming=True)
    assert sources.content_key(source) is None
    assert hub.calls == []
    load([source])
    hub.rows = tiny.sft_rows(9)
    assert load([source]).report["train"]["kept"] == 9


def test_a_key_is_that_of_the_rows_and_their_columns(hub, tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(5))
    made = [Source("owner/data"), Source(str(file)), Source(str(file), columns={"x": "prompt"})]
    keys = [sources.content_key(source) for source in made]
    assert [sources.content_key(source) for source in made] == keys
    hub.rows = tiny.sft_rows(6)
    file.write_text(file.read_text().replace("what", "why"))
    assert len({*keys, *(sources.content_key(source) for source in made)}) == 6


def test_bad_rows_of_a_stream_are_counted(hub):
    hub.rows = [*tiny.sft_rows(2), {"prompt": "a", "completion": None}, *tiny.sft_rows(2)]
    source = Source("owner/data", streaming=True)
    assert error_of([source]).startswith("owner/data:3: column completion")
    report = load([source], on_bad_row="skip", max_dropped=0.2).report["train"]
    assert (report["read"], report["kept"], report["dropped"]) == (5, 4, {"unreadable": 1})


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
def test_a_hub_data_set_that_cannot_be_loaded(streaming, hub):
    hub.rows = FileNotFoundError("Dataset 'owner/data' doesn't exist on the Hub\nand more")
    message = error_of([Source("owner/data", streaming=streaming)])
    assert message.startswith("owner/data (split train): no such file or folder, and cannot be")


@pytest.mark.parametrize("error", [ConnectionError("lost"), ValueError("lost")], ids=["net", "any"])
def test_a_stream_that_breaks_off_is_an_error_with_its_place(error, hub):
    def rows():
        yield from tiny.sft_rows(2)
        raise error

    hub.rows = rows()
    assert "owner/data" in error_of([Source("owner/data", streaming=True)])


class Endless:
    """A stream that must not be read to its end."""

    def __iter__(self):
        yield from ({"prompt": f"what {n}?"} for n in range(9))
        raise ConnectionError("read on")


def test_the_texts_of_prompts_are_read_up_to_the_last_one(hub):
    """On-policy training and its held-out prompts read the rows of max_examples again."""
    hub.rows, train = Endless(), [Source("owner/data", streaming=True)]
    config = {"max_examples": 4, "eval": 2}
    data = load(train, task="prompt", **config)
    config = DataConfig(train=train, **config)
    parts = [dataset.questions_of(config, part, train) for part in (data.train, data.held_out)]
    asked = [[question.messages[0]["content"] for question in part] for part in parts]
    assert sorted(sum(asked, [])) == [f"what {n}?" for n in range(4)] and len(asked[1]) == 2


def test_a_local_file_is_not_streamed(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", ROWS)
    assert "streaming is for hub data sets" in error_of([Source(str(file), streaming=True)])
    assert "subset is for hub data sets" in error_of([Source(str(file), subset="sub")])


@pytest.mark.parametrize(
    "path",
    [
        "imdb",
        "owner/data",
        "teknium/OpenHermes-2.5",
    ],
)
def test_a_name_without_a_file_is_that_of_a_hub_data_set(path, hub):
    assert rows_of(path) == tiny.sft_rows(5)


def test_without_datasets_local_files_are_read_and_others_say_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in KINDS:
        (tmp_path / name).write_bytes(KINDS[name](ROWS))
        assert rows_of(tmp_path / name) == ROWS
    assert "pip install datasets" in error_of("owner/data")
    assert "pip install datasets" in error_of([Source("owner/data", streaming=True)])


# What columns mean


def test_columns_are_mapped(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", [{"q": "a?", "a": "b", "n": 1}])
    named = {"prompt": "q", "completion": "a"}
    assert rows_of(file, columns=named) == [{"prompt": "a?", "completion": "b", "n": 1}]
    assert load(file, columns=named).report["train"]["kept"] == 1
    assert error_of(file, columns={"prompt": "x"}) == (
        f"{file}:1: no column 'x', which data.columns names; found q, a, n"
    )
    reversed_ = error_of(file, columns={"q": "prompt"})
    assert reversed_.endswith("found q, a, n; write {our name: name in the source}")
    assert error_of(file, columns={"prompt": "nn"}).endswith("; did you mean n?")


def test_columns_may_be_swapped_shared_and_moved_away(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", [{"chosen": "a", "rejected": "b", "prompt": "c"}])
    for columns, row in (
        ({"chosen": "rejected", "rejected": "chosen"}, {"chosen": "b", "rejected": "a"}),
        ({"one": "chosen", "two": "chosen"}, {"one": "a", "two": "a", "rejected": "b"}),
        ({"chosen": "chosen"}, {"chosen": "a", "rejected": "b"}),
    ):
        assert rows_of(file, columns=columns) == [row | {"prompt": "c"}]


@pytest.mark.parametrize(
    "task, row, named, columns",
    cases(
        (
            "conversation",
            "conversation",
            {"prompt": "a?", "completion": "b", "messages": [USER, GOOD]},
            "(prompt, completion) or (messages)",
            {"unused": "messages"},
        ),
        (
            "two lists",
            "conversation",
            {"messages": [USER, GOOD], "conversations": [USER, BAD]},
            "(messages) or (conversations)",
            {"unused": "conversations"},
        ),
        (
            "pair",
            "pair",
            {"prompt": "a?", "chosen": "b", "rejected": "c"}
            | {"instruction": "a?", "chosen_response": "c", "rejected_response": "b"},
            "(prompt, chosen, rejected) or (instruction, chosen_response, rejected_response)",
            {"unused": "instruction"},
        ),
        (
            "label",
            "label",
            {"text": "a", "label": 1, "non_toxic": "b", "toxic": "c"},
            "(text, label) or (non_toxic, toxic)",
            {"unused": "toxic"},
        ),
    ),
)
def test_columns_with_two_meanings_are_an_error_until_one_is_moved(
    task, row, named, columns, tmp_path
):
    file = tiny.write_rows(tmp_path / "a.jsonl", [row])
    message = error_of(file, task=task)
    assert message.startswith(f"{file}:1: columns {', '.join(row)} may mean {named};")
    assert "data.columns" in message
    meant = {name: value for name, value in row.items() if name not in columns.values()}
    other = tiny.write_rows(tmp_path / "b.jsonl", [meant])
    data = load(file, task=task, columns=columns).train
    np.testing.assert_array_equal(data.ids, load(other, task=task).train.ids)


PAIRS = [
    {"prompt": "a?", "chosen": "b", "rejected": "c"},
    {"instruction": "a?", "chosen_response": "b", "rejected_response": "c"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": "b", "rejected": "c"},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "a?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
]


def test_all_forms_of_pairs_mean_the_same(tmp_path):
    seen = set()
    for row in PAIRS:
        data = load(tiny.write_rows(tmp_path / "a.jsonl", [row]), task="pair").train
        seen.add((data.tokens.tobytes(), data.bounds.tobytes()))
    assert len(seen) == 1


def test_all_forms_of_conversations_mean_the_same(tmp_path):
    rows = [
        {"prompt": "a?", "completion": "b"},
        {"prompt": [USER], "completion": [GOOD]},
        {"messages": [USER, GOOD]},
        {"conversations": [USER, GOOD]},
        {"transcript": "### Human: a?### Assistant: b"},
    ]
    files = [tiny.write_rows(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]
    assert len({load(file).train.ids.item() for file in files}) == 1


def test_a_transcript_is_its_turns(tmp_path):
    text = "### Human: a?\n### b ### Assistant: c\n\n- d### Human: e?### Assistant: f"
    form = data_columns.form_of(["transcript"], "conversation")
    turns = data_columns.conversation(data_columns.Record({"transcript": text}), form)[0]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in turns] == ["a?\n### b", "c\n\n- d", "e?", "f"]
    for wrong in ("a?", "x ### Human: a?", ""):
        file = tiny.write_rows(tmp_path / "a.jsonl", [{"transcript": wrong}])
        pytest.raises(DataError, load, file).match("must begin with ### Human:")
    for quoted in (
        "### Human: what is '### Assistant:'?### Assistant: it starts an answer",
        "### Human: a?### Assistant: write ### Human: and your text### Human: b?",
    ):
        file = tiny.write_rows(tmp_path / "a.jsonl", [{"transcript": quoted}])
        pytest.raises(DataError, load, file).match("a.jsonl:1: .*two turns of one speaker")
    # backwards, the question is learned from its answer
    file = tiny.write_rows(tmp_path / "b.jsonl", [{"text": text}])
    learned = load(file, reverse=True, columns={"transcript": "text"}).train
    tokens = learned.tokens[learned.learned]
    assert tiny.tokenizer().decode(tokens) == "a?\n### b<|endoftext|>"


@pytest.mark.parametrize(
    "row, reason",
    cases(
        (
            "two prompts",
            {"chosen": [USER, GOOD], "rejected": [USER | {"content": "z?"}, BAD]},
            "chosen and rejected answer different prompts",
        ),
        ("no prompt", {"chosen": "b", "rejected": "c"}, "no column prompt, and chosen holds no"),
        ("no answer", {"chosen": [USER], "rejected": [USER, BAD]}, "must end in an assistant's"),
        ("no messages", {"chosen": [], "rejected": [USER, BAD]}, "must end in an assistant's"),
        ("null", {"chosen": None, "rejected": [BAD]}, "column chosen: wanted text or a list"),
        ("number", {"prompt": 1, "chosen": "b", "rejected": "c"}, "column prompt.*found a number"),
    ),
)
def test_a_pair_that_is_none_is_an_error_or_a_counted_drop(row, reason, tmp_path):
    rows = [row, *([PAIRS[0]] * 3 if "prompt" in row else [PAIRS[4]] * 3)]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    pytest.raises(DataError, load, file, task="pair").match(f"^{file}:1: .*{reason}")
    report = load(file, task="pair", on_bad_row="skip", max_dropped=0.5).report["train"]
    assert (report["read"], report["kept"], report["dropped"]) == (4, 3, {"unreadable": 1})


def test_a_system_message_before_an_answer_does_not_replace_the_prompt(tmp_path):
    system = {"role": "system", "content": "be kind"}
    row = {"prompt": "a?", "chosen": [system, GOOD], "rejected": [system, BAD]}
    try:
        data = load(tiny.write_rows(tmp_path / "a.jsonl", [row]), task="pair").train
    except DataError:
        return
    assert "a?" in tiny.tokenizer().decode(data.tokens)


@pytest.mark.parametrize(
    "label, meant",
    [(0, 0), (1, 1), ("0", 0), ("1", 1), (" 1 ", 1), (1.0, 1), (True, 1), (False, 0), ("true", 1)],
    ids=repr,
)
def test_a_label_is_0_or_1(label, meant, tmp_path):
    data = load(
        tiny.write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": label}]), task="label"
    )
    assert data.train.labels.tolist() == [meant] and data.train.answers == 1


@pytest.mark.parametrize("label", ["maybe", "", None, 2, -1, 0.5, [1]], ids=repr)
def test_any_other_label_is_an_error_or_a_counted_drop(label, tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "a", "label": label}]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    assert error_of(file, task="label").startswith(
        f"{file}:2: column label: wanted 0 or 1, found {label!r}"
    )
    report = load(file, task="label", on_bad_row="skip", max_dropped=0.5).report["train"]
    assert (report["read"], report["kept"], report["dropped"]) == (2, 1, {"unreadable": 1})


@pytest.mark.parametrize("better, worse", [("harmless", "harmful"), ("non_toxic", "toxic")])
def test_of_two_texts_the_better_one_stands_first(better, worse, tmp_path):
    rows = [{worse: "c", better: "b"}, {worse: "", better: "b"}, {worse: 3, better: "b"}]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    assert f"a.jsonl:3: column {worse}: wanted text, found a number" in error_of(file, task="label")
    data = load(file, task="label", on_bad_row="skip", max_dropped=0.9)
    assert data.report["train"]["dropped"] == {"unreadable": 1, "empty text": 1}
    _, *bounds = data.train.bounds[0]
    texts = [tiny.tokenizer().decode(data.train.tokens[a:b]) for a, b in pairwise(bounds)]
    assert [text.replace("<|endoftext|>", "") for text in texts] == ["b", "c"]
    assert np.isnan(data.train.labels).all()


# Every row is kept or counted

FATE = {"good": None, "broken": "unreadable", "empty": "empty answer", "same": "identical answers"}


def line_of(kind, number, pairs):
    if kind == "broken":
        return '{"prompt": "a'
    texts = {"good": ["b", "c"], "empty": ["b", " "], "same": ["b", " b "]}[kind]
    answers = zip(("chosen", "rejected"), texts, strict=True)
    row = answers if pairs else {"completion": texts[kind == "empty"]}
    return json.dumps({"prompt": f"{number}?", **dict(row)})


@pytest.mark.parametrize("pairs", [False, True], ids=["conversations", "pairs"])
@given(kinds=st.lists(st.sampled_from([*FATE]), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_kept_and_dropped_rows_add_up_to_the_file(pairs, kinds):
    kinds = [kind if pairs or kind != "same" else "good" for kind in kinds]
    assume("good" in kinds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jsonl"
        file.write_text("".join(line_of(k, i, pairs) + "\n" for i, k in enumerate(kinds)))
        task = "pair" if pairs else "conversation"
        data = load(file, task=task, on_bad_row="skip", max_dropped=0.99)
    report = data.report["train"]
    assert report["read"] == len(kinds) == report["kept"] + sum(report["dropped"].values())
    assert report["dropped"] == Counter(FATE[kind] for kind in kinds if kind != "good")
    assert report["first_dropped"] == {
        FATE[kind]: f"{file}:{kinds.index(kind) + 1}" for kind in set(kinds) - {"good"}
    }
    assert data.train.rows.tolist() == [i for i, kind in enumerate(kinds) if kind == "good"]
