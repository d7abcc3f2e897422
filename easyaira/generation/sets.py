"""Folders of sets: files of rows that an interrupted command continues.

A set is renamed to its final name once complete, so a set with that name is not written again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from easyaira.errors import ConfigError, StorageError
from easyaira.files import json_line, open_new, read_json, reason, write_file

SETTINGS, COUNTS = "settings.json", "counts.json"
Put = Callable[[str, Mapping[str, Any]], None]


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder of another command.

    Args:
        settings: name, as in the message, and value of everything that decides the sets.

    Raises:
        ConfigError: it was made with other settings, or holds other files.
    """
    record = folder / SETTINGS
    begun = SETTINGS, f".{SETTINGS}.new"  # all that is left of a command that is refused later
    empty = folder.is_dir() and all(path.name in begun for path in folder.iterdir())
    if empty or not folder.exists():
        return
    if not record.exists():
        raise ConfigError(f"output: {folder} is not empty; name another folder")
    before = read_json(record)
    for name, value in settings.items():
        if before.get(name) != value:
            raise ConfigError(
                f"output: {folder} was made with other settings ({name}); name another folder"
            )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Report disk errors inside with the folder's name."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {reason(error)}") from error


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Create a folder that `check_folder` accepts, with its settings."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


@contextmanager
def new_sets(folder: Path, names: Sequence[str]) -> Iterator[Put]:
    """Yield `put(name, row)`; the sets appear, in this order, when all rows are written."""
    with ExitStack() as opened:
        files = {name: opened.enter_context(open_new(folder / f"{name}.new")) for name in names}

        def put(name: str, row: Mapping[str, Any]) -> None:
            files[name].write(json_line(row))

        yield put
    for name in names:
        (folder / f"{name}.new").rename(folder / name)


def write_counts(folder: Path, counts: Mapping[str, Any]) -> None:
    """Write counts.json."""
    write_file(folder / COUNTS, json.dumps(counts, indent=2) + "\n")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a set."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)
