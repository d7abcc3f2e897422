"""Prompts, answers and texts that Python code gives as a list; columns.py reads those of files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

from easyaira.data.columns import Message, question
from easyaira.data.record import Record, Unreadable
from easyaira.errors import ConfigError, DataError, shortened
from easyaira.files import lone_surrogate

Prompt = str | Sequence[Mapping[str, str]]  # a user's message, or the messages before an answer


def read_prompts(name: str, prompts: Any) -> list[list[Message]]:
    """Messages of each prompt.

    Args:
        name: the function, for messages.

    Raises:
        ConfigError: see `_check`.
        DataError: an entry is not a prompt, or ends in an answer.
    """
    _check(name, prompts)
    return [_prompt(prompt, f"{name}: place {i}") for i, prompt in enumerate(prompts)]


def read_answers(name: str, answers: Any) -> list[str]:
    """The answers; raises as `read_prompts`."""
    _check(name, answers)
    return [
        _text(answer, f"{name}: place {i}", "a text as answer") for i, answer in enumerate(answers)
    ]


def read_texts(name: str, texts: Any) -> list[str | list[Message]]:
    """Texts, and the conversations of pairs (prompt, answer); raises as `read_prompts`."""
    if isinstance(texts, tuple) and _is_pair(texts):
        raise ConfigError(f"{name}: expected a list, got one pair; write [pair]")
    _check(name, texts)
    read: list[str | list[Message]] = []
    for i, text in enumerate(texts):
        where = f"{name}: place {i}"
        if not _is_pair(text):
            read.append(_text(text, where, "a text or (prompt, answer)"))
            continue
        answer = _text(text[1], where, "a text as answer")
        read.append([*_prompt(text[0], where), {"role": "assistant", "content": answer}])
    return read


@contextmanager
def at(where: str) -> Iterator[None]:
    """Say where the content is that is refused here."""
    try:
        yield
    except (DataError, Unreadable) as error:
        reason = re.sub("^column [a-z]+: ", "", str(error))  # there is no column
        raise DataError(f"{where}: {reason}") from error


def _check(name: str, given: Any) -> None:
    """Check that the entries of a list are meant.

    Raises:
        ConfigError: it is a single text or conversation, whose characters or messages would be
            taken for separate texts; an iterator, which would be used up; or a dictionary.
    """
    if not isinstance(given, Collection) or isinstance(given, Mapping | Set | bytes):
        kind = type(given).__name__
        raise ConfigError(f"{name}: expected a list, got an object of type {kind}")
    if isinstance(given, str) or any(map(_is_message, given)):
        one = "text" if isinstance(given, str) else "conversation"
        raise ConfigError(f"{name}: expected a list, got one {one}; write [{one}]")


def _prompt(prompt: Any, where: str) -> list[Message]:
    with at(where):
        return question(Record({"prompt": prompt}))


def _text(text: Any, where: str, wanted: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: wanted {wanted}, found {shortened(repr(text))}")
    if (place := lone_surrogate(text)) is not None:
        raise DataError(f"{where}: found a lone surrogate at {place}; remove it")
    return text


def _is_message(given: Any) -> bool:
    return isinstance(given, Mapping) and "content" in given


def _is_pair(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
