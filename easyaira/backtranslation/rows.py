"""Rows of the input: exchanges of an instruction and its answer, and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from easyaira.config.data import Source
from easyaira.data import columns, sources
from easyaira.data.recipe import Dropped
from easyaira.data.texts import first_exchange
from easyaira.errors import DataError


class Exchange(NamedTuple):
    """A row with an instruction and its answer.

    Attributes:
        place: file and line.
        row: all its columns.
        fault: why it cannot be used; None if it can.
    """

    place: str
    row: Mapping[str, Any]
    instruction: str
    answer: str
    fault: str | None


def exchanges(source: Source) -> Iterator[Exchange]:
    """The first exchange of each row, in any form of data that SFT takes.

    Raises:
        DataError: a row is unreadable.
    """
    form = None
    for place, row in sources.read(source):
        try:
            if isinstance(row, sources.BadRow):
                raise columns.Unreadable(row.reason)
            form = form or columns.form_of(list(row), "conversation")
            messages, _ = columns.conversation(columns.Record(row), form)
            instruction, answer = first_exchange(messages)
        except (columns.Unreadable, DataError) as error:
            raise DataError(f"{place}: {error}") from error
        except Dropped as error:
            yield Exchange(place, row, "", "", str(error))
            continue
        empty = not instruction.strip() or not answer.strip()
        fault = "empty instruction or answer" if empty else None
        yield Exchange(place, row, instruction, answer, fault)


class Text(NamedTuple):
    """A text to find an instruction for.

    Attributes:
        place: file and line.
        instruction: the true one, where the row has it.
    """

    place: str
    text: str
    instruction: str | None


def texts(source: Source) -> Iterator[Text]:
    """The texts of rows with a column text, or with prompt and completion as `reverse` writes them.

    Raises:
        DataError: a row is unreadable.
    """
    for place, row in sources.read(source):
        if isinstance(row, sources.BadRow):
            raise DataError(f"{place}: {row.reason}")
        names = ("text",) if "text" in row else ("prompt", "completion")
        if not set(names) <= set(row):
            present = ", ".join(row)
            raise DataError(
                f"{place}: wanted a column text, or prompt and completion; found {present}"
            )
        try:
            (text, *instruction), _ = columns.judged(columns.Record(row), columns.Form(names))
        except columns.Unreadable as error:
            raise DataError(f"{place}: {error}") from error
        yield Text(place, text, instruction[0] if instruction else None)
