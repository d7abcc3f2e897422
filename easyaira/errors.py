"""Errors that a user can fix, with the exit status that a scheduler acts on.

Every message is one line: place, value found, value expected, and the fix.
"""

from __future__ import annotations

import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def escaped(text: str, keep: str = "") -> str:
    """Escape unprintable characters not in `keep`, so that a text cannot control a terminal."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> tuple[str, int]:
    """Format an error as one line, and give its exit status for a scheduler."""
    if isinstance(error, EasyAiraError | Preempted):
        kind = "stopped" if isinstance(error, Preempted) else "error"
        return f"{kind}: {error}", error.exit_status
    lines = str(error).strip().splitlines()
    return f"error: {type(error).__name__}: {lines[0][:300] if lines else 'a bug'}", 1


KINDS = {"NoneType": "null", "bool": "true or false", "int": "a number", "float": "a number"}
KINDS |= {"str": "a text", "list": "a list", "dict": "an object"}


def kind_of(value: Any) -> str:
    """Kind of a value from a file, in the words of JSON."""
    return KINDS.get(type(value).__name__, type(value).__name__)


def shortened(text: str, limit: int = 80) -> str:
    """Shorten a text for a message; one from a file may be of any length."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def on_one_line(error: Exception) -> str:
    """Message of a library's error on one line; the error's type if the message is empty."""
    return shortened(" ".join(str(error).split()) or type(error).__name__, 200)


def folded(text: str) -> str:
    """Lines of a log, folded between words at the width of a terminal; for a file, as they are."""
    if not sys.stdout.isatty():
        return text
    fold = textwrap.TextWrapper(
        shutil.get_terminal_size().columns,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )
    return "\n".join(fold.fill(line) for line in text.split("\n"))


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The nearest option for a message, or nothing; `lr` is learning_rate."""
    options = list(options)
    last = name.rpartition(".")[2]
    words = {option: option.rpartition(".")[2].split("_") for option in options}
    near = [option for option in options if last == "".join(word[:1] for word in words[option])]
    near += difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


class EasyAiraError(Exception):
    """Base of all errors that a user can fix.

    Unprintable characters in the message are escaped, so names and texts read from files cannot
    break its one line.
    """

    exit_status = 1

    def __init__(self, message: str):
        super().__init__(escaped(message))


@contextmanager
def shown_as(place: Any, name: Any) -> Iterator[None]:
    """Replace `place` by `name`, as the user calls it, in errors raised inside."""
    try:
        yield
    except EasyAiraError as error:
        if str(place) not in str(error):
            raise
        raise type(error)(str(error).replace(str(place), str(name))) from error


class ConfigError(EasyAiraError):
    exit_status = 2


class DataError(EasyAiraError):
    exit_status = 2


class RewardError(DataError):
    """A reward function failed or gave nonsense. Every host raises it at the same update."""


class TokenizerError(EasyAiraError):
    exit_status = 2


class WeightsError(EasyAiraError):
    exit_status = 2


class UnsafeInputError(EasyAiraError):
    exit_status = 2


class CheckFailed(EasyAiraError):
    """A check of the self-test failed."""

    exit_status = 2


class NonFiniteError(EasyAiraError):
    """A loss or a gradient was NaN or infinite; the parameters before that update are kept."""

    exit_status = 3


class StorageError(EasyAiraError):
    """Reading or writing a run folder failed."""

    exit_status = 4


class HostError(EasyAiraError):
    """A host hangs or was lost."""

    exit_status = 5


class Preempted(BaseException):
    """The run was asked to stop and has saved its state; the same command resumes it. Not an
    Exception, so that code which takes any error of a library for a fault lets it pass."""

    exit_status = 75
