"""Forms of rows: sets of columns that hold a conversation, answers to compare, or a text to score.

To add a form, add a line to FORMS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from easyaira.data import formats
from easyaira.data.record import HISTORY, SYSTEM, WEIGHTS, Record, Unreadable
from easyaira.errors import DataError, kind_of
from easyaira.files import lone_surrogate

Message = dict[str, Any]  # role, content, and learned if the row says so


class Form(NamedTuple):
    """A set of columns that make up a row.

    Attributes:
        columns: required columns: the answers, or the whole content.
        prompt: column of the prompt, if the form has one.
        bare: the prompt column is optional.
        detail: column of text that follows the prompt, if it is filled.
        otherwise: counts only for columns that match no other form.
    """

    columns: tuple[str, ...]
    prompt: str | None = None
    bare: bool = False
    detail: str | None = None
    otherwise: bool = False

    def fits(self, columns: Sequence[str]) -> bool:
        needed = {*self.columns} | ({self.prompt} if self.prompt and not self.bare else set())
        return needed <= set(columns)

    def __str__(self) -> str:
        return ", ".join(name for name in (self.prompt, self.detail, *self.columns) if name)


FORMS = {
    "conversation": (
        Form(("completion",), "prompt"),
        Form(("messages",)),
        Form(("conversations",)),
        Form(("transcript",)),
        Form(("output",), "instruction", detail="input"),
        Form(("response",), "instruction", detail="context"),
        Form(("text",), otherwise=True),  # learned whole, without a template
    ),
    "pair": (
        Form(("chosen", "rejected"), "prompt", bare=True),  # bare: the answers are messages
        Form(("chosen_response", "rejected_response"), "instruction"),
        Form(("answers",), "prompt"),  # see answers.RANKING
        Form(("completions",), "instruction"),  # of UltraFeedback, each with its score
    ),
    "rated": (Form(("completion", "label"), "prompt"),),
    "label": (
        Form(("text", "label")),
        Form(("harmless", "harmful")),
        Form(("non_toxic", "toxic")),
    ),
}

# the command for each form of rows
TRAINED_BY = {
    "conversation": "sft",
    "pair": "dpo",
    "rated": "dpo --dpo.loss_type kto",
    "label": "reward",
}


def usual(tasks: Sequence[str]) -> str:
    """The first form of each task, for messages."""
    return " or ".join(f"({FORMS[task][0]})" for task in tasks)


def fitting(columns: Sequence[str], tasks: Sequence[str]) -> list[tuple[str, Form]]:
    """Forms that the columns match, each with its task."""
    pairs = [(task, form) for task in tasks for form in FORMS[task] if form.fits(columns)]
    return [(task, form) for task, form in pairs if not form.otherwise] or pairs


def form_of(columns: Sequence[str], task: str) -> Form:
    """The form that the columns match.

    Raises:
        DataError: the columns match no form, or several.
    """
    forms = [form for _, form in fitting(columns, [task])]
    if len(forms) == 1:
        return forms[0]
    if forms:
        raise DataError(
            f"columns {', '.join(columns)} may mean {' or '.join(f'({f})' for f in forms)}; rename "
            "the unwanted ones with data.columns, such as {unused: messages}"
        )
    raise DataError(
        f"found columns {', '.join(columns)}; wanted {' or '.join(f'({f})' for f in FORMS[task])}. "
        f"{hint(columns, task)}"
    )


def hint(columns: Sequence[str], task: str | None = None) -> str:
    """What to do with columns that match no form of the task."""
    if odd := formats.other_separator(columns):
        return f"The {odd}"
    others = fitting(columns, [other for other in TRAINED_BY if other != task])
    if others := [(other, form) for other, form in others if not form.otherwise]:
        other, form = max(others, key=lambda fits: str(fits[1]).count(","))
        return f"`easyaira {TRAINED_BY[other]}` trains on ({form})"
    return "Name them in data.columns, such as {prompt: question}"


def conversation(row: Record, form: Form) -> tuple[list[Message], int]:
    """Convert a row to messages, and count those of its prompt.

    Raises:
        Unreadable: a column is missing or has the wrong type.
    """
    answer = form.columns[0]
    if answer == "text":
        return [{"role": "assistant", "content": _whole(row)}], 0
    prompt = prompt_of(row, form)
    if answer == "transcript":
        turns = turns_of(row, answer)
    else:
        turns = messages_of(row, answer, role="assistant" if form.prompt else None)
    return joined(prompt, turns, answer)


def question(row: Record, advice: str = "") -> list[Message]:
    """Convert a row to the messages that a model has to answer.

    Raises:
        Unreadable: there are none; with this advice if their column is missing.
    """
    names = [name for name in ("prompt", "messages") if name in row]
    if len(names) == 2:
        raise Unreadable("columns prompt, messages: both hold the prompt; remove one")
    if not names:
        raise Unreadable(f"wanted a column prompt or messages; found {', '.join(row)}{advice}")
    turns = prompt_of(row, Form((), names[0] if names[0] == "prompt" else None))
    if "messages" in row:
        if row.filled(HISTORY):
            raise Unreadable(f"column {HISTORY}: stands beside messages; join the two")
        turns, _ = joined(turns, messages_of(row, "messages"), "messages")
    if not turns or turns[-1]["role"] == "assistant":
        raise Unreadable(f"column {names[0]}: must end in a message to answer")
    return [{name: turn[name] for name in ("role", "content")} for turn in turns]


SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
SPEAKERS |= {"model": "assistant"} | {role: role for role in ("user", "assistant", "system")}
QUOTED = "a quotation may hold a speaker's marker, and be split there"
TRANSCRIPT = "a text is a transcript, learned whole; columns {transcript: text} learns its answers"


def _whole(row: Record) -> str:
    text = _text(row, "text")
    if re.match(r"\s*(### )?(Human|Assistant):", text):
        row.notes.append(TRANSCRIPT)
    return text


def turns_of(row: Record, name: str, *, bare: bool = False) -> list[Message]:
    """Parse `### Human: ...### Assistant: ...`, the format of OpenAssistant-Guanaco, or the same
    with a blank line for `###`, the format of HH-RLHF; `bare`: the first blank line is missing."""
    transcript = "\n\n" + _text(row, name).lstrip() if bare else _text(row, name)
    mark = "### " if transcript.lstrip().startswith("###") else r"(?:\r?\n){2}"
    before, *parts = re.split(rf"{mark}(Human|Assistant):", transcript)
    if before.strip() or not parts:
        raise Unreadable(f"column {name}: must begin with ### Human: or ### Assistant:")
    if any(who == following for who, following in pairwise(parts[::2])):
        raise Unreadable(f"column {name}: two turns of one speaker; a text may quote a marker")
    if any(sum(text.count(sign) % 2 for text in parts[1::2]) > 1 for sign in ('"', "```")):
        row.notes.append(QUOTED)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[who.lower()], "content": text.strip()} for who, text in turns]


def prompt_of(row: Record, form: Form) -> list[Message]:
    """The turns that stand in columns of their own: system prompt, history and prompt."""
    system = [name for name in SYSTEM if row.filled(name)][:1]
    turns = [{"role": "system", "content": _text(row, name)} for name in system]
    name = form.prompt or "prompt"
    if not row.filled(name) and (form.bare or not form.prompt):
        return turns
    if row.filled(HISTORY):
        turns += _history(row)
    prompt = messages_of(row, name, role="user")
    if form.detail and row.filled(form.detail):
        prompt[-1]["content"] += "\n" + _text(row, form.detail)
    return joined(turns, prompt, name)[0]


def _history(row: Record) -> list[Message]:
    """Convert the column of earlier turns: messages, or pairs [question, answer]."""
    turns = row[HISTORY]
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Sequence) for turn in turns):
        return messages_of(row, HISTORY)
    if not all(len(turn) == 2 and not isinstance(turn, str) for turn in turns):
        raise Unreadable(f"column {HISTORY}: wanted messages or pairs [question, answer]")
    wanted = f"column {HISTORY}: wanted text"
    return [
        {"role": role, "content": _checked(text, wanted)}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def joined(prompt: list[Message], turns: list[Message], name: str) -> tuple[list[Message], int]:
    """Put the prompt before the turns of a column, unless they contain it already; return them with
    the number of turns up to the prompt's end.

    Raises:
        Unreadable: the two contradict each other.
    """
    systems, (prompt, turns) = [], map(list, (prompt, turns))
    for part in (prompt, turns):
        if part and part[0]["role"] == "system":
            systems.append(part.pop(0))
    if len(systems) == 2 and not _same(systems[:1], systems[1:]):
        raise Unreadable(f"column {name}: has another system prompt than the prompt's column")
    systems, count = systems[:1], len(prompt)
    if not prompt:
        return [*systems, *turns], 0
    if turns and turns[0]["role"] != "assistant":
        for start in range(len(turns) - count + 1):
            if _same(prompt, turns[start : start + count]):
                return [*systems, *turns], len(systems) + start + count
    answered = prompt[-1]["role"] == "assistant"
    if turns and answered == (turns[0]["role"] == "assistant"):
        raise Unreadable(
            "the prompt ends in an answer that the next column continues; join the two"
            if answered
            else f"column {name}: begins with another question than the prompt; leave one out"
        )
    return [*systems, *prompt, *turns], len(systems) + count


def _same(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    return all(
        one["role"] == other["role"] and one["content"].strip() == other["content"].strip()
        for one, other in zip(messages, others, strict=True)
    )


def judged(row: Record, form: Form) -> tuple[list[str], float]:
    """Convert a row to its texts and label: one text with 0 or 1, or two texts, the better one
    first, with NaN.

    Raises:
        Unreadable: a column is missing or has the wrong type.
    """
    if form.columns != ("text", "label"):
        return [_text(row, name) for name in form.columns], float("nan")
    return [_text(row, "text")], label(row)


def label(row: Record) -> float:
    """The label of a row, 0 or 1; raises Unreadable."""
    return float(_flag(column_of(row, "label"), "column label"))


def _flag(value: Any, where: str) -> bool:
    if str(value).strip().lower() not in ("0", "1", "0.0", "1.0", "true", "false"):
        raise Unreadable(f"{where}: wanted 0 or 1, found {value!r}")
    return str(value).strip().lower() in ("1", "1.0", "true")


def column_of(row: Record, name: str) -> Any:
    if name not in row:
        raise Unreadable(f"no column {name}, which earlier rows have; found {', '.join(row)}")
    return row[name]


def _text(row: Record, name: str) -> str:
    return _checked(column_of(row, name), f"column {name}: wanted text")


def _checked(text: Any, wanted: str) -> str:
    if not isinstance(text, str):
        raise Unreadable(f"{wanted}, found {kind_of(text)}")
    if (place := lone_surrogate(text)) is not None:
        raise Unreadable(f"{wanted}, found a lone surrogate at {place}")
    return text


# a list of messages that was turned into text, as JSON or by Python (pandas in a CSV file)
AS_TEXT = re.compile(
    r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value)\1\s*:.*\}\s*\]\s*""", re.DOTALL
)
A_ROLE = re.compile(r"""(["'])(?:role|from)\1\s*:\s*(["'])(?:user|assistant|system|human|gpt)\2""")


def messages_of(row: Record, name: str, role: str | None = None) -> list[Message]:
    """Convert a column to messages; a plain text becomes one message of `role`."""
    return as_messages(row, column_of(row, name), name, role)


def as_messages(row: Record, value: Any, name: str, role: str | None = None) -> list[Message]:
    if isinstance(value, str) and role:
        text = _checked(value, f"column {name}: wanted text")
        if AS_TEXT.fullmatch(text) and A_ROLE.search(text):
            raise Unreadable(f"column {name}: a list of messages written as text; write it as JSON")
        return [{"role": role, "content": text}]
    wanted = "text or a list of messages" if role else "a list of messages"
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise Unreadable(f"column {name}: wanted {wanted}, found {kind_of(value)}")
    return [_message(row.part(turn, name), name) for turn in value]


def _message(turn: Record, name: str) -> Message:
    if turn.filled("tool_calls") or turn.filled("function_call"):
        raise Unreadable(f"column {name}: tool calls are not supported")
    if turn.filled("from") and not turn.filled("role"):
        speaker, keys = turn["from"], ("value", "content")
        if speaker not in SPEAKERS:
            raise Unreadable(f"column {name}: wanted from {', '.join(SPEAKERS)}; found {speaker!r}")
        message = {"role": SPEAKERS[speaker]}
    elif isinstance(turn.get("role"), str):
        message, keys = {"role": turn["role"]}, ("content", "value")
    else:
        raise Unreadable(f"column {name}: a message must be {{role: ..., content: text}}")
    key = next((key for key in keys if turn.filled(key)), keys[0])
    message["content"] = _content(turn, turn.get(key), name)
    flags = {_flag(turn[key], f"column {name}: key {key}") for key in WEIGHTS if turn.filled(key)}
    if len(flags) > 1:
        raise Unreadable(f"column {name}: a message is marked both learned and not learned")
    if flags == {True} and message["role"] != "assistant":
        raise Unreadable(f"column {name}: only answers can be learned; mark no other turn")
    return message | ({"learned": False} if flags == {False} else {})


def _content(turn: Record, content: Any, name: str) -> str:
    """The text of a message; parts of text are joined."""
    wanted = f"column {name}: wanted text as content"
    if not isinstance(content, list | tuple) or not content:
        return _checked(content, wanted)
    parts = [turn.part(part, name) for part in content]
    if kinds := [part.get("type") for part in parts if part.get("type") != "text"]:
        raise Unreadable(f"{wanted}, found a part of type {kinds[0]!r}")
    return "".join(_checked(part.get("text"), wanted) for part in parts)
