"""Prompts from a file, and answers to a file that an interrupted command continues."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from easyaira.config.data import Source
from easyaira.data import columns, formats, sources
from easyaira.data.template import Template
from easyaira.errors import ConfigError, DataError, StorageError
from easyaira.files import json_line, lock, parse_json, read_json, reason, write_file
from easyaira.generation.sampler import Answer, Sampler

GENERATED = ("generated", "finish_reason", "sample")  # columns of the output


class Prompt(NamedTuple):
    """A row of the input.

    Attributes:
        place: file and line.
        row: all its columns, for the output.
        tokens: the prompt in the template.
    """

    place: str
    row: Mapping[str, Any]
    tokens: np.ndarray


def read(path: str, template: Template, sampler: Sampler) -> list[Prompt]:
    """Read the prompts of a file.

    Raises:
        DataError: a row is unreadable, has no prompt, has a column of the output, or leaves no room
            for an answer; or there are no rows.
    """
    return [_prompt(located, template, sampler) for located in sources.read(Source(path))]


def _prompt(located: sources.Located, template: Template, sampler: Sampler) -> Prompt:
    place, row = located
    try:
        if isinstance(row, sources.BadRow):
            raise columns.Unreadable(row.reason)
        check_free(row, GENERATED)
        messages = columns.question(columns.Record(row))
        tokens = template.prompt(messages)
        sampler.limit(tokens)
    except (columns.Unreadable, DataError) as error:
        raise DataError(f"{place}: {error}") from error
    return Prompt(place, row, tokens)


def check_free(row: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a row with a column of the output, which would replace it.

    Raises:
        Unreadable: the row has one of these columns.
    """
    if taken := [name for name in names if name in row]:
        raise columns.Unreadable(f"column {taken[0]}: rename it; the output adds one of this name")


class Output:
    """A file of answers in the order of their prompts, a JSON object in each line.

    Whole lines are appended, so a killed command leaves at most one cut line, which is made again.
    The settings that decide the answers are in a file beside it.

    Args:
        path: the file; created with its first line.
        settings: everything but the prompts that decides the answers.

    Raises:
        ConfigError: the file exists and belongs to another command.
        StorageError: it cannot be read or written.
    """

    def __init__(
        self, path: Path, prompts: Sequence[Prompt], num_samples: int, settings: dict[str, Any]
    ):
        self.path, self.prompts, self.num_samples = path, prompts, num_samples
        self.settings, self.settings_file = settings, path.with_name(f"{path.name}.settings.json")
        self.waiting: dict[int, str] = {}
        self.whole = 0  # bytes of whole lines
        self.total = len(prompts) * num_samples
        if path.name.endswith((*formats.READERS,)) and path.suffix != ".jsonl":
            raise ConfigError(f"output: {path}: answers are written as JSON lines; name it .jsonl")
        if not path.parent.is_dir():
            raise ConfigError(f"output: {path.parent} is not a folder; create it")
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise ConfigError(f"output: {path} is {kind}; name a file, such as answers.jsonl")
        try:
            self.size = path.stat().st_size if path.exists() else 0
            self.written = self._continue() if self.size else 0
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {reason(error)}") from error

    def _continue(self) -> int:
        """Check the lines of an interrupted command; return their number."""
        other = f"output: {self.path} exists"
        if not self.settings_file.exists():
            raise ConfigError(f"{other} and has no {self.settings_file.name}; name another file")
        before = read_json(self.settings_file)
        for name in before.keys() | self.settings.keys():
            if before.get(name) != self.settings.get(name):
                raise ConfigError(
                    f"{other} with {name} {before.get(name)!r}, but {self.settings.get(name)!r} is "
                    "asked for; name another file"
                )
        count = 0
        with open(self.path, "rb") as file:
            if not lock(file, fcntl.LOCK_SH):
                raise self._in_use()
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if count >= self.total or not self._is_of(line, count):
                    raise ConfigError(
                        f"{other} and its line {count + 1} is of another prompt; name another file"
                    )
                count, self.whole = count + 1, self.whole + len(line)
        return count

    def _is_of(self, line: bytes, number: int) -> bool:
        try:
            content = parse_json(line)
        except ValueError:
            return False
        row = json.loads(self._line(number, "", ""))
        return isinstance(content, dict) and row == content | {"generated": "", "finish_reason": ""}

    def _line(self, number: int, text: str, why: str) -> str:
        row = dict(self.prompts[number // self.num_samples].row)
        row |= {"generated": text, "finish_reason": why}
        if self.num_samples > 1:
            row["sample"] = number % self.num_samples
        return json_line(row)

    def write(self, answers: Iterator[tuple[int, Answer]], text: Any) -> None:
        """Append each answer as soon as all before it are written.

        Raises:
            StorageError: the file cannot be written.
        """
        file = None
        try:
            for number, answer in answers:
                self.waiting[number] = self._line(number, text(answer), answer.reason)
                while self.written in self.waiting:
                    file = file or self._open()
                    file.write(self.waiting.pop(self.written).encode())
                    file.flush()
                    self.written += 1
            if file:
                file.close()
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {reason(error)}") from error
        finally:
            if file:
                with suppress(OSError):  # it tries once more to write
                    file.close()

    def _open(self) -> Any:
        """Lock the file, and cut it after its last whole line."""
        file = open(self.path, "ab")
        if not lock(file, fcntl.LOCK_EX) or file.tell() != self.size:
            file.close()
            raise self._in_use()
        if not self.written:
            write_file(self.settings_file, json.dumps(self.settings, indent=2) + "\n")
        file.truncate(self.whole)
        return file

    def _in_use(self) -> ConfigError:
        return ConfigError(
            f"output: another command writes {self.path}; wait until it ends, or name another file"
        )
