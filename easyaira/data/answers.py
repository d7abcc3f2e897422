"""Rows of answers to compare: a pair, or several answers with scores or ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from easyaira.data.columns import (
    Form,
    Message,
    Record,
    Unreadable,
    as_messages,
    column_of,
    joined,
    messages_of,
    prompt_of,
    turns_of,
)
from easyaira.data.recipe import Dropped
from easyaira.errors import kind_of

RANKING = ("scores", "ranks")  # columns that say which of the answers are better
MOST_ANSWERS = 64  # to a prompt


def compared(row: Record, form: Form) -> tuple[list[Message], list[str], list[int]]:
    """Convert a row to the messages before the answers, the answers, best first, and their ranks
    from 0; tied answers have one rank, and keep their order.

    Raises:
        Unreadable: a column is missing or has the wrong type, the answers have different prompts,
            there are more or fewer scores or ranks than answers, or one of them is not finite.
        Dropped: there are fewer than two answers.
    """
    if len(form.columns) == 2:
        sides = [_side(row, name, form.prompt) for name in form.columns]
        return *_answers(row, form, sides), [0, 1]
    name = form.columns[0]
    answers = column_of(row, name)
    if not isinstance(answers, Sequence) or isinstance(answers, str | bytes):
        raise Unreadable(f"column {name}: wanted a list of answers, found {kind_of(answers)}")
    if len(answers) > MOST_ANSWERS:
        raise Unreadable(f"column {name}: {len(answers)} answers, more than {MOST_ANSWERS}")
    if name == "completions":
        answers, values = _of_ultrafeedback([row.part(answer, name) for answer in answers])
    else:
        values = _ranking(row, len(answers))
    if len(answers) < 2:
        raise Dropped("fewer than two answers")
    levels = sorted(set(values))
    order = sorted(range(len(values)), key=values.__getitem__)
    sides = [as_messages(row, answers[i], name, "assistant") for i in order]
    return *_answers(row, form, sides), [levels.index(values[i]) for i in order]


def _of_ultrafeedback(completions: Sequence[Record]) -> tuple[list[Any], list[float]]:
    """Answers, and numbers that are lower for better ones."""
    where = "completions: key overall_score"
    scores = [_finite(completion.get("overall_score"), where) for completion in completions]
    return [completion.get("response") for completion in completions], [-score for score in scores]


def _ranking(row: Record, count: int) -> list[float]:
    """Numbers of the answers that are lower for better ones."""
    given = [name for name in RANKING if row.filled(name)]
    if len(given) != 1:
        which = "both" if given else "neither"
        raise Unreadable(f"column answers: needs {' or '.join(RANKING)} beside it, found {which}")
    name, numbers = given[0], row[given[0]]
    if not isinstance(numbers, Sequence) or isinstance(numbers, str | bytes):
        raise Unreadable(f"column {name}: wanted a list of numbers, found {kind_of(numbers)}")
    if len(numbers) != count:
        raise Unreadable(f"column {name}: {len(numbers)} numbers for {count} answers")
    return [_finite(number, name) * (-1 if name == "scores" else 1) for number in numbers]


def _finite(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Unreadable(f"column {where}: wanted finite numbers, found {value!r}")
    return number


def _answers(
    row: Record, form: Form, sides: Sequence[list[Message]]
) -> tuple[list[Message], list[str]]:
    """The messages before the answers, and the answers at the end of each side; raises
    Unreadable."""
    prompt, first = prompt_of(row, form), sides[0]
    names = " and ".join(form.columns)
    if any(not side or side[-1]["role"] != "assistant" for side in sides):
        raise Unreadable(f"{names} must end in an assistant's turn")
    if not all(side[-1].get("learned", True) for side in sides):
        raise Unreadable(f"{names}: an answer is marked not to be learned")
    if any(side[:-1] != first[:-1] for side in sides):
        raise Unreadable(f"{names} answer different prompts")
    if form.prompt in row and not any(turn["role"] == "user" for turn in (*prompt, *first)):
        prompt += messages_of(row, form.prompt, role="user")
    before, _ = joined(prompt, first, form.columns[0])
    if not any(turn["role"] == "user" for turn in before):
        raise Unreadable(
            f"no column {form.prompt}, and {form.columns[0]} holds no prompt; found "
            f"{', '.join(row)}; name the prompt in data.columns, such as {{prompt: question}}"
        )
    turns = [{name: turn[name] for name in ("role", "content")} for turn in before[:-1]]
    return turns, [side[-1]["content"] for side in sides]


def _side(row: Record, name: str, prompt: str) -> list[Message]:
    """Convert a side of a pair; without a prompt, a text may be a whole transcript."""
    text = column_of(row, name)
    if isinstance(text, str) and not row.filled(prompt) and re.match(r"\s*Human:", text):
        return turns_of(row, name, bare=True)
    return messages_of(row, name, role="assistant")
