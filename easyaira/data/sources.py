"""Data sets: local files, folders and the hub. Rows are read one by one, with their places."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from easyaira.config.data import Source
from easyaira.data import folders
from easyaira.data.formats import READERS, BadRow, Located, read_file, reader_of
from easyaira.errors import DataError, EasyAiraError, did_you_mean, kind_of
from easyaira.files import named_path, reason


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
        return (located for file in files for located in read_file(file))
    return _read_with_datasets(source)


def _files(source: Source) -> list[Path]:
    """Data files of a source; empty if the package `datasets` must load it.

    Raises:
        DataError: no file exists, or its format is unknown, or an option does not apply to it.
    """
    path = named_path(source.path)
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: is a link to {path.readlink()}, which does not exist; mend it")
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
    if reader_of(path) is None:
        raise DataError(f"{path}: unknown file format; wanted {', '.join(READERS)}")
    return [path]


def _looks_like_hub_id(text: str) -> bool:
    """True for owner/name or a bare name; a bare name may not have a file ending."""
    a_file = reader_of(Path(text)) or ("/" not in text and Path(text).suffix)
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1 and not a_file


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
    # the hub's log has each failed attempt twice; the error says what failed
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if path.is_dir():
            return datasets.load_from_disk(str(folders.saved(path, source.split)))
        options = {"split": source.split, "streaming": source.streaming}
        return datasets.load_dataset(source.path, source.subset, **options)
    except EasyAiraError:
        raise
    except Exception as error:  # the library raises many types, which all mean the same here
        local = "" if path.exists() else "no such file or folder, and "
        raise DataError(
            f"{source.path} (split {source.split}): {local}cannot be loaded: {reason(error)}"
        ) from error
