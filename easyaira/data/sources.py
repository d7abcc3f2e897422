"""Rows of data sets, wherever they lie, each with its place for messages, and what they mean.

`read` gives dictionaries; `conversation` and `pair` turn one into messages, a list of
{role, content}, whatever columns it came in.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from easyaira.config import Source
from easyaira.errors import DataError

Message = dict[str, str]


class Located(NamedTuple):
    """A row, and where it stands."""

    place: str
    row: Mapping[str, Any]


def read(source: Source) -> Iterator[Located]:
    """The rows of a data set in its order, with columns under our names.

    Raises:
        DataError: nothing is there, a line cannot be read, or a mapped column is missing.
    """
    path = Path(source.path).expanduser()
    if source.split != "train" and path.exists() and not _is_dataset_dict(path):
        raise DataError(f"{path}: has no splits; leave out split {source.split!r}")
    if path.is_file():
        rows = _read_file(path)
    elif path.is_dir() and not (path / "state.json").exists() and not _is_dataset_dict(path):
        files = sorted(file for file in path.iterdir() if _reader(file))
        if not files:
            raise DataError(f"{path}: no data file in this folder; wanted {', '.join(READERS)}")
        rows = (located for file in files for located in _read_file(file))
    elif path.is_dir() or _looks_like_hub_id(source.path):
        rows = _read_with_datasets(source, path)
    else:
        raise DataError(f"{source.path}: no such file or folder; check the path")
    count = 0
    for place, row in rows:
        count += 1
        if not isinstance(row, Mapping):
            raise DataError(
                f"{place}: a row must be an object with columns, found {type(row).__name__}"
            )
        if missing := sorted(set(source.columns.values()) - set(row)):
            raise DataError(
                f"{place}: no column {missing[0]!r}, as data.columns wants; found {', '.join(row)}"
            )
        yield Located(
            place, dict(row) | {ours: row[theirs] for ours, theirs in source.columns.items()}
        )
    if not count:
        raise DataError(f"{source.path}: no rows")


def _is_dataset_dict(path: Path) -> bool:
    return (path / "dataset_dict.json").exists()


def _looks_like_hub_id(text: str) -> bool:
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1 and not Path(text).suffix


def _read_file(path: Path) -> Iterator[Located]:
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; wanted {', '.join(READERS)}")
    try:
        for number, row in reader(path):
            yield Located(f"{path}:{number}", row)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _reader(path: Path):
    return next((READERS[suffix] for suffix in READERS if path.name.endswith(suffix)), None)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not JSON: {error}") from error


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}; one object a line is a .jsonl file") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: wanted a list of rows, found {type(rows).__name__}")
    yield from enumerate(rows, 1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(io.StringIO(lines.read()), strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        batches = (batch for batch in file.iter_batches())
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_arrow(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as stream:
            batches = pyarrow.ipc.open_stream(stream)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


READERS = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _read_with_datasets(source: Source, path: Path) -> Iterator[Located]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source.path}: reading it needs the package datasets (pip install datasets); local "
            f"{', '.join(READERS)} files do not"
        ) from error
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
            rows = rows[source.split] if _is_dataset_dict(path) else rows
        else:
            rows = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the library raises many kinds, all of them mean the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source.path} (split {source.split}): cannot be loaded: {reason}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield Located(f"{source.path}:{number}", row)


def conversation(located: Located) -> list[Message]:
    """A row of a data set for SFT as messages.

    Raises:
        DataError: the columns are of no known form, or a text is not text.
    """
    row = located.row
    if "messages" in row:
        return _messages(located, "messages")
    if "prompt" in row and "completion" in row:
        return [*_prompt(located, "prompt"), *_answer(located, "completion")]
    raise _unknown_columns(located, "prompt, completion", "messages")


def pair(located: Located) -> tuple[list[Message], str, str]:
    """A row of a preference data set as the messages before the answers, chosen and rejected text.

    Raises:
        DataError: the columns are of no known form, a text is not text, or the two sides answer
            different prompts.
    """
    row = located.row
    for prompt, chosen, rejected in (
        ("prompt", "chosen", "rejected"),
        ("instruction", "chosen_response", "rejected_response"),
    ):
        if (
            chosen in row
            and rejected in row
            and (prompt in row or not isinstance(row[chosen], str))
        ):
            break
    else:
        raise _unknown_columns(
            located, "prompt, chosen, rejected", "instruction, chosen_response, rejected_response"
        )
    sides = [_answer(located, name) for name in (chosen, rejected)]
    before = [side[:-1] for side in sides]
    if before[0] != before[1]:
        raise DataError(f"{located.place}: {chosen} and {rejected} answer different prompts")
    if not before[0] or before[0][0]["role"] == "assistant":
        before[0] = [*_prompt(located, prompt), *before[0]]
    if any(not side or side[-1]["role"] != "assistant" for side in sides):
        raise DataError(f"{located.place}: {chosen} and {rejected} must end in an assistant's turn")
    return before[0], sides[0][-1]["content"], sides[1][-1]["content"]


def _prompt(located: Located, column: str) -> list[Message]:
    if isinstance(located.row.get(column), str):
        return [{"role": "user", "content": located.row[column]}]
    return _messages(located, column)


def _answer(located: Located, column: str) -> list[Message]:
    if isinstance(located.row.get(column), str):
        return [{"role": "assistant", "content": located.row[column]}]
    return _messages(located, column)


def _messages(located: Located, column: str) -> list[Message]:
    found = located.row.get(column)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise DataError(
            f"{located.place}: column {column}: wanted text or a list of messages, found "
            f"{type(found).__name__}"
        )
    messages = []
    for turn in found:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise DataError(
                f"{located.place}: column {column}: a message is {{role: ..., content: text}}"
            )
        messages.append({"role": str(turn.get("role")), "content": turn["content"]})
    return messages


def _unknown_columns(located: Located, *wanted: str) -> DataError:
    return DataError(
        f"{located.place}: found columns {', '.join(located.row)}; wanted {' or '.join(wanted)}. "
        "Name them in data.columns, such as {prompt: question}"
    )
