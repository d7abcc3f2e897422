"""Streaming readers of data sets: local files, folders and the hub. Rows come with their place.

An unreadable row is yielded as a `BadRow`, so that the caller decides. An error that ends the file,
such as truncation or a missing column, is a DataError. A reader keeps at most one long row in
memory, or a few thousand short ones.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from easyaira.config.data import Source
from easyaira.data import folders
from easyaira.errors import DataError, EasyAiraError, did_you_mean, kind_of, shortened
from easyaira.files import named_path, no_key_twice, parse_json, reason

MAX_ROW_BYTES = 64 * 2**20  # a longer row is an error, or an attack
ROWS_AT_ONCE = 1000  # batch size for columnar files
BYTES_AT_ONCE = 2**26  # of such a batch as Python objects, unless a single row is larger


class BadRow(NamedTuple):
    """An unreadable row, with the reason."""

    reason: str


class Located(NamedTuple):
    """A row, with its place (file and line, or index)."""

    place: str
    row: Mapping[str, Any] | BadRow


def read(source: Source) -> Iterator[Located]:
    """Yield the rows of a data set in order, with columns renamed by `source.columns`.

    Raises:
        DataError: there are no rows, a file is damaged, or the first row lacks a mapped column.
    """
    count = 0
    for place, row in _rows(source):
        count += 1
        if not isinstance(row, Mapping | BadRow):
            row = BadRow(f"a row must be an object with columns, found {kind_of(row)}")
        if isinstance(row, BadRow):
            yield Located(place, row)
            continue
        if missing := sorted(set(source.columns.values()) - set(row)):
            problem = f"no column {missing[0]!r}, which data.columns names; found {', '.join(row)}"
            problem += (
                "; write {our name: name in the source}"
                if source.columns.keys() <= row.keys()
                else did_you_mean(missing[0], row)
            )
            if count == 1:
                raise DataError(f"{place}: {problem}")
            yield Located(place, BadRow(problem))
            continue
        renamed = {ours: row[theirs] for ours, theirs in source.columns.items()}
        moved = set(source.columns.values()) - set(source.columns)
        kept = {name: value for name, value in row.items() if name not in moved}
        replaced = {  # reported if filled
            f"{ours} (replaced by {theirs})": row[ours]
            for ours, theirs in source.columns.items()
            if ours in row and ours not in source.columns.values()
        }
        yield Located(place, kept | renamed | replaced)
    if not count:
        raise DataError(f"{source.path}: no rows; is it the right file?")


def content_key(source: Source) -> str | None:
    """Hash of the rows that `read` yields, for caches; None for streamed data."""
    digest = hashlib.sha256(json.dumps([source.subset, source.split, source.columns]).encode())
    if files := _files(source):
        for file in files:
            digest.update(file.name.encode())
            try:
                with open(file, "rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    elif source.streaming:
        return None
    else:
        digest.update(_load_with_datasets(source)._fingerprint.encode())
    return digest.hexdigest()


def _rows(source: Source) -> Iterator[Located]:
    if files := _files(source):
        return (located for file in files for located in _read_file(file))
    return _read_with_datasets(source)


def _files(source: Source) -> list[Path]:
    """Data files of a source; empty if the package `datasets` must load it.

    Raises:
        DataError: no file exists, or its format is unknown, or an option does not apply to it.
    """
    path = named_path(source.path)
    if not path.exists() and folders.is_pattern(source.path):
        return folders.files_matching(path, source.split, tuple(READERS))
    if not path.exists() and not _looks_like_hub_id(source.path):
        raise DataError(f"{source.path}: no such file or folder; check the path")
    for option in ("streaming", "subset"):
        if path.exists() and getattr(source, option):
            raise DataError(f"{path}: {option} is for hub data sets; leave it out for local files")
    if not path.exists() or folders.is_saved(path):
        return []
    if path.is_dir():
        return folders.files_of(path, source.split, tuple(READERS))
    if not path.is_file():
        raise DataError(f"{path}: is not a regular file; save its rows to a file first")
    if source.split != "train":
        raise DataError(f"{path}: has no splits; leave out split {source.split!r}")
    if _reader(path) is None:
        raise DataError(f"{path}: unknown file format; wanted {', '.join(READERS)}")
    return [path]


def _looks_like_hub_id(text: str) -> bool:
    """True for owner/name or a bare name; a bare name may not have a file ending."""
    a_file = _reader(Path(text)) or ("/" not in text and Path(text).suffix)
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1 and not a_file


def _reader(path: Path):
    return next((READERS[suffix] for suffix in READERS if path.name.endswith(suffix)), None)


def _read_file(path: Path) -> Iterator[Located]:
    import pyarrow

    try:
        _check_format(path)
        for number, row in _reader(path)(path):
            yield Located(f"{path}:{number}", row)
    except (
        OSError,
        EOFError,
        UnicodeDecodeError,
        zlib.error,
        pyarrow.ArrowException,
    ) as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}; it may be cut off") from error
    except (OverflowError, ValueError) as error:  # times that Python cannot represent
        raise DataError(f"{path}: cannot be read: {reason(error)}; leave its column out") from error


FORMATS = {  # first bytes of files that are not text
    b"\x1f\x8b": "is gzip; name it .jsonl.gz",
    b"\x28\xb5\x2f\xfd": "is Zstandard; decompress it",
    b"BZh": "is bzip2; decompress it",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is Parquet; name it .parquet",
    b"ARROW1": "is Arrow; name it .arrow",
}


LIST = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|$)")  # of objects


def _check_format(path: Path) -> None:
    """Raise DataError if a file whose name promises text holds something else."""
    if not path.name.endswith((".jsonl", ".json", ".csv")):
        return
    with open(path, "rb") as file:
        start = file.read(64)
    if path.suffix == ".jsonl" and LIST.match(start):
        raise DataError(f"{path}: is one JSON list, not one object per line; name it .json")
    for magic, fix in FORMATS.items():
        if start.startswith(magic):
            raise DataError(f"{path}: {fix}")


def _parse(text: bytes) -> Any:
    """Parse one JSON value; return a BadRow if it is invalid."""
    try:
        return parse_json(text)
    except ValueError as error:
        return BadRow(str(error))


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as lines:
        number = 0
        while line := lines.readline(MAX_ROW_BYTES):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{path}: is UTF-16; save it as UTF-8")
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_ROW_BYTES)
                yield number, BadRow(f"longer than {MAX_ROW_BYTES >> 20} MiB")
            elif line.strip():
                yield number, _parse(line)


BETWEEN_ITEMS = re.compile(r"[ \t\r\n,]*")
WINDOW = 2**20


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of one JSON list, decoded one by one from a window of the text."""
    decoder = json.JSONDecoder(object_pairs_hook=no_key_twice)
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(WINDOW).lstrip()
        if not text:
            return
        if not text.startswith("["):
            raise DataError(
                f"{path}: wanted a list of rows in [ ], found {shortened(repr(text), 20)}; one "
                "object a line is a .jsonl file"
            )
        place, number = 1, 0
        while True:
            place = BETWEEN_ITEMS.match(text, place).end()
            if text[place : place + 1] == "]":
                if (text[place + 1 :] + file.read()).strip():
                    raise DataError(f"{path}: has text after its list of {number} rows")
                return
            try:
                item, end = decoder.raw_decode(text, place)
                if end == len(text) and not isinstance(item, Mapping):
                    raise ValueError("cut off")  # the window may cut a number
            except (ValueError, RecursionError) as error:
                window = file.read(max(WINDOW, len(text)))
                if not window or len(text) - place > MAX_ROW_BYTES:
                    raise DataError(f"{path}:{number + 1}: not JSON: {error}") from error
                text, place = text[place:] + window, 0
                continue
            number += 1
            yield number, item
            place = end
            if place > WINDOW:
                text, place = text[place:], 0


def other_separator(head: Sequence[str]) -> str | None:
    """What is wrong with the first line of a CSV file that has no commas, for a message."""
    marks = [mark for mark in ";\t|" if len(head) == 1 and mark in head[0]]
    return f"columns are separated by {marks[0]!r}; write the file with commas" if marks else None


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            head = next(reader, [])
            if any(not name.isprintable() for name in head):
                raise DataError(f"{path}:1: column names are not UTF-8 text; re-encode the file")
            if len(set(head)) != len(head):
                raise DataError(f"{path}:1: a column name occurs twice; wanted a line of names")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(head):
                    if odd := other_separator(head):
                        raise DataError(f"{path}: {odd}")
                    row: Any = BadRow(f"{len(cells)} cells, but the first line has {len(head)}")
                elif any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
                    row = BadRow("not UTF-8; re-encode the file")
                else:
                    row = dict(zip(head, cells, strict=True))
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    # kept as dictionaries: a long text that stands in many rows is decoded once
    shared = {
        chunk.path_in_schema
        for chunk in chunks
        if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page
    }
    with pyarrow.parquet.ParquetFile(
        path, page_checksum_verification=True, read_dictionary=sorted(shared)
    ) as file:
        _check_columns(path, file.schema_arrow)
        yield from enumerate(_rows_of(file.iter_batches(ROWS_AT_ONCE)), 1)


def _rows_of(batches: Iterable[Any]) -> Iterator[Any]:
    """Rows of Arrow batches as Python objects, few at once where they may be large."""
    for batch in (batch for batch in batches if batch.num_rows):
        # a row may repeat any value of a dictionary, and so be as large as the batch
        row = batch.nbytes if "dictionary<" in str(batch.schema) else batch.nbytes // batch.num_rows
        step = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(row, 1)))
        for start in range(0, batch.num_rows, step):
            yield from batch.slice(start, step).to_pylist()


END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def _check_columns(path: Path, schema: Any) -> None:
    if len(set(schema.names)) != len(schema.names):
        raise DataError(f"{path}: a column name occurs twice; found {', '.join(schema.names)}")


def _read_arrow(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as stream:
        try:
            batches = pyarrow.ipc.open_stream(stream)
            schema = batches.schema
            with open(path, "rb") as file:  # pyarrow accepts a truncated stream
                file.seek(-len(END_OF_STREAM), 2)
                if file.read() != END_OF_STREAM:
                    raise EOFError("no end of the stream")
        except pyarrow.ArrowInvalid:  # not a stream: Arrow's file format
            file = pyarrow.ipc.open_file(stream)
            schema = file.schema
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        _check_columns(path, schema)
        pieces = (
            batch.slice(start, ROWS_AT_ONCE)
            for batch in batches
            for start in range(0, batch.num_rows, ROWS_AT_ONCE)
        )
        yield from enumerate(_rows_of(pieces), 1)


READERS = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _read_with_datasets(source: Source) -> Iterator[Located]:
    rows, number = iter(_load_with_datasets(source)), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the library raises many types: network, damaged file
            raise DataError(
                f"{source.path}:{number + 1}: cannot be read: {type(error).__name__}: {error}"
            ) from error
        if row is None:
            return
        number += 1
        yield Located(f"{source.path}:{number}", row)


def _load_with_datasets(source: Source) -> Any:
    path = named_path(source.path)
    if source.path.isdecimal() and not path.exists():  # asking the hub takes half a minute
        raise DataError(f"{source.path}: no such file, and not a hub id; name a file or owner/name")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source.path}: needs the package datasets (pip install datasets); local "
            f"{', '.join(READERS)} files do not"
        ) from error
    try:
        if path.is_dir():
            return datasets.load_from_disk(str(folders.saved(path, source.split)))
        options = {"split": source.split, "streaming": source.streaming}
        return datasets.load_dataset(source.path, source.subset, **options)
    except EasyAiraError:
        raise
    except Exception as error:  # the library raises many types, which all mean the same here
        raise DataError(
            f"{source.path} (split {source.split}): cannot be loaded: {reason(error)}"
        ) from error
