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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from easyaira.config.data import Source
from easyaira.errors import DataError

MAX_ROW_BYTES = 64 * 2**20  # a longer row is an error, or an attack
ROWS_AT_ONCE = 1000  # batch size for columnar files


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
            row = BadRow(f"a row must be an object with columns, found {type(row).__name__}")
        if isinstance(row, BadRow):
            yield Located(place, row)
            continue
        if missing := sorted(set(source.columns.values()) - set(row)):
            reason = f"no column {missing[0]!r}, which data.columns names; found {', '.join(row)}"
            if count == 1:
                raise DataError(f"{place}: {reason}")
            yield Located(place, BadRow(reason))
            continue
        renamed = {ours: row[theirs] for ours, theirs in source.columns.items()}
        moved = set(source.columns.values()) - set(source.columns)
        kept = {name: value for name, value in row.items() if name not in moved}
        yield Located(place, kept | renamed)
    if not count:
        raise DataError(f"{source.path}: no rows")


def content_key(source: Source) -> str | None:
    """Hash of the rows that `read` yields, for caches; None for streamed data."""
    digest = hashlib.sha256(json.dumps([source.split, source.columns]).encode())
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
    path = Path(source.path).expanduser()
    if not path.exists() and not _looks_like_hub_id(source.path):
        raise DataError(f"{source.path}: no such file or folder; check the path")
    if path.exists() and source.streaming:
        raise DataError(f"{path}: streaming is for hub data sets; leave it out for local files")
    if path.exists() and source.split != "train" and not _is_dataset_dict(path):
        raise DataError(f"{path}: has no splits; leave out split {source.split!r}")
    if not path.exists() or (path / "state.json").exists() or _is_dataset_dict(path):
        return []
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.iterdir() if _reader(file) and file.is_file())
    )
    if not files:
        raise DataError(f"{path}: no data file in this folder; wanted {', '.join(READERS)}")
    if _reader(files[0]) is None:
        raise DataError(f"{path}: unknown file format; wanted {', '.join(READERS)}")
    return files


def _is_dataset_dict(path: Path) -> bool:
    return (path / "dataset_dict.json").exists()


def _looks_like_hub_id(text: str) -> bool:
    """True for owner/name or a bare name; a bare name may not have a file ending."""
    a_file = _reader(Path(text)) or ("/" not in text and Path(text).suffix)
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1 and not a_file


def _reader(path: Path):
    return next((READERS[suffix] for suffix in READERS if path.name.endswith(suffix)), None)


def _read_file(path: Path) -> Iterator[Located]:
    import pyarrow

    try:
        for number, row in _reader(path)(path):
            yield Located(f"{path}:{number}", row)
    except (
        OSError,
        EOFError,
        UnicodeDecodeError,
        zlib.error,
        pyarrow.ArrowException,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read: {reason}; it may be cut off") from error


def _parse(text: bytes) -> Any:
    """Parse one JSON value; return a BadRow if it is invalid."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte {error.object[error.start]:#x} at {error.start}; re-encode")
    except RecursionError:
        return BadRow("not JSON: nested too deeply")
    except ValueError as error:
        return BadRow(f"not JSON: {error}")


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
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(WINDOW).lstrip()
        if not text.startswith("["):
            raise DataError(
                f"{path}: wanted a list of rows in [ ]; one object a line is a .jsonl file"
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

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        _check_columns(path, file.schema_arrow)
        batches = file.iter_batches(ROWS_AT_ONCE)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


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
        yield from enumerate((row for piece in pieces for row in piece.to_pylist()), 1)


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
    path = Path(source.path).expanduser()
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source.path}: needs the package datasets (pip install datasets); local "
            f"{', '.join(READERS)} files do not"
        ) from error
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
            if not _is_dataset_dict(path):
                return rows
            if source.split not in rows:
                raise ValueError(f"the splits are {', '.join(rows)}")
            return rows[source.split]
        return datasets.load_dataset(source.path, split=source.split, streaming=source.streaming)
    except Exception as error:  # the library raises many types, which all mean the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source.path} (split {source.split}): cannot be loaded: {reason}"
        ) from error
