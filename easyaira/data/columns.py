"""Forms of rows: sets of columns that hold a conversation, a pair of answers, or a text to score.

To add a form, add a line to FORMS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from easyaira.errors import DataError

Message = dict[str, str]


class Form(NamedTuple):
    """A set of columns that make up a row.

    Attributes:
        columns: required columns: the answers, or the whole content.
        prompt: column of the prompt, if the form has one.
        bare: the prompt column is optional.
    """

    columns: tuple[str, ...]
    prompt: str | None = None
    bare: bool = False

    def fits(self, columns: Sequence[str]) -> bool:
        needed = {*self.columns} | ({self.prompt} if self.prompt and not self.bare else set())
        return needed <= set(columns)

    def __str__(self) -> str:
        return ", ".join([*([self.prompt] if self.prompt else []), *self.columns])


FORMS = {
    "conversation": (
        Form(("completion",), "prompt"),
        Form(("messages",)),
        Form(("conversations",)),
        Form(("transcript",)),
    ),
    "pair": (
        Form(("chosen", "rejected"), "prompt", bare=True),  # bare: the answers are messages
        Form(("chosen_response", "rejected_response"), "instruction"),
    ),
    "label": (
        Form(("text", "label")),
        Form(("harmless", "harmful")),
        Form(("non_toxic", "toxic")),
    ),
}


class Unreadable(Exception):
    """The content of a row does not match its columns; the message says why."""


def form_of(columns: Sequence[str], task: str) -> Form:
    """The form that the columns match.

    Raises:
        DataError: the columns match no form, or several.
    """
    forms = [form for form in FORMS[task] if form.fits(columns)]
    if len(forms) == 1:
        return forms[0]
    if forms:
        raise DataError(
            f"columns {', '.join(columns)} may mean {' or '.join(f'({f})' for f in forms)}; rename "
            "the unwanted ones with data.columns, such as {unused: messages}"
        )
    raise DataError(
        f"found columns {', '.join(columns)}; wanted {' or '.join(f'({f})' for f in FORMS[task])}. "
        "Name them in data.columns, such as {prompt: question}"
    )


def conversation(row: Mapping[str, Any], form: Form) -> list[Message]:
    """Convert a row to messages.

    Raises:
        Unreadable: a column is missing or has the wrong type.
    """
    if form.columns == ("transcript",):
        return _turns(_text(row, "transcript"))
    if form.prompt is None:
        return _messages(row, form.columns[0])
    return [
        *_messages(row, form.prompt, role="user"),
        *_messages(row, form.columns[0], role="assistant"),
    ]


SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def _turns(transcript: str) -> list[Message]:
    """Parse `### Human: ...### Assistant: ...`, the format of OpenAssistant-Guanaco."""
    before, *parts = re.split(r"### (Human|Assistant):", transcript)
    if before.strip() or not parts:
        raise Unreadable("column transcript: must begin with ### Human: or ### Assistant:")
    if any(who == following for who, following in pairwise(parts[::2])):
        raise Unreadable(
            "column transcript: two turns of one speaker in a row; a text may quote a marker"
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[who], "content": text.strip()} for who, text in turns]


def pair(row: Mapping[str, Any], form: Form) -> tuple[list[Message], str, str]:
    """Convert a row to the messages before the answers, the chosen answer and the rejected one.

    Raises:
        Unreadable: a column is missing or has the wrong type, or the two sides answer different
            prompts.
    """
    chosen, rejected = (_messages(row, name, role="assistant") for name in form.columns)
    if any(not side or side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise Unreadable(f"{' and '.join(form.columns)} must end in an assistant's turn")
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise Unreadable(f"{' and '.join(form.columns)} answer different prompts")
    if not any(message["role"] == "user" for message in before):
        if form.prompt not in row:
            raise Unreadable(f"no column {form.prompt}, and {form.columns[0]} holds no prompt")
        start = int(bool(before) and before[0]["role"] == "system")
        before = [*before[:start], *_messages(row, form.prompt, role="user"), *before[start:]]
    return before, chosen[-1]["content"], rejected[-1]["content"]


def judged(row: Mapping[str, Any], form: Form) -> tuple[list[str], float]:
    """Convert a row to its texts and label: one text with 0 or 1, or two texts, the better one
    first, with NaN.

    Raises:
        Unreadable: a column is missing or has the wrong type.
    """
    if form.columns != ("text", "label"):
        return [_text(row, name) for name in form.columns], float("nan")
    label = _column(row, "label")
    if str(label).strip().lower() not in ("0", "1", "0.0", "1.0", "true", "false"):
        raise Unreadable(f"column label: wanted 0 or 1, found {label!r}")
    return [_text(row, "text")], float(str(label).strip().lower() in ("1", "1.0", "true"))


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise Unreadable(f"no column {name}, which earlier rows have; found {', '.join(row)}")
    return row[name]


def _text(row: Mapping[str, Any], name: str) -> str:
    return _checked(_column(row, name), f"column {name}: wanted text")


def _checked(text: Any, wanted: str) -> str:
    if not isinstance(text, str):
        raise Unreadable(f"{wanted}, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unreadable(f"{wanted}, found a lone surrogate at {error.start}") from error
    return text


def _messages(row: Mapping[str, Any], name: str, role: str | None = None) -> list[Message]:
    """Convert a column to messages; a plain text becomes one message of `role`."""
    value = _column(row, name)
    if isinstance(value, str) and role:
        return [{"role": role, "content": _text(row, name)}]
    wanted = "text or a list of messages" if role else "a list of messages"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Unreadable(f"column {name}: wanted {wanted}, found {type(value).__name__}")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise Unreadable(f"column {name}: a message must be {{role: ..., content: text}}")
        content = _checked(turn.get("content"), f"column {name}: wanted text as content")
        messages.append({"role": turn["role"], "content": content})
    return messages
