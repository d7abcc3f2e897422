"""Readers of data files, one for each format.

An unreadable row is yielded as a `BadRow`, so that the caller decides. An error that ends the file,
such as truncation or a missing column, is a DataError. A reader keeps at most one long row in
memory, or a few thousand short ones.

To add a format, add a line to READERS.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from easyaira.errors import DataError, shortened
from easyaira.files import no_key_twice, parse_json, reason

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


def reader_of(path: Path) -> Callable[[Path], Iterator[tuple[int, Any]]] | None:
    """The reader of a file's format, by its name."""
    return next((READERS[suffix] for suffix in READERS if path.name.endswith(suffix)), None)


def read_file(path: Path) -> Iterator[Located]:
    """The rows of a file of one of the READERS' formats.

    Raises:
        DataError: the file is damaged, or of another format than its name says.
    """
    import pyarrow

    try:
        _check_format(path)
        for number, row in reader_of(path)(path):
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
NAMED = {  # first bytes and format that a name promises, and what to do without them
    ".gz": (b"\x1f\x8b", "gzip; name it without .gz"),
    ".parquet": (b"PAR1", "Parquet; name it after its format"),
}


def _check_format(path: Path) -> None:
    """Raise DataError if a file holds something else than its name promises."""
    with open(path, "rb") as file:
        start = file.read(64)
    if path.suffix in NAMED:
        magic, promised = NAMED[path.suffix]
        if not start:
            raise DataError(f"{path}: is empty; write its rows again")
        if not start.startswith(magic):
            raise DataError(f"{path}: is not {promised}")
    if not path.name.endswith((".jsonl", ".json", ".csv")):
        return
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
            lines = text.startswith("{") and text.count("\n{")
            fix = "name it .jsonl, for one object a line" if lines else "save the list alone"
            start = shortened(" ".join(text[:99].split()), 20)
            raise DataError(f"{path}: wanted a list of rows in [ ], found {start}; {fix}")
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
