"""Rows to texts: the conversations, answers or texts of a row, or why there are none to learn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from easyaira.data import columns
from easyaira.data.answers import compared
from easyaira.data.recipe import Dropped, Recipe
from easyaira.data.template import Template
from easyaira.data.truncate import untied
from easyaira.errors import DataError

FRAMED = "a text has its own start or end token, which is not added a second time"
SPOKEN = re.compile(r"\s*(?:###\s*)?Human:.*\bAssistant:", re.DOTALL)
NOT_SPLIT = "a text names its speakers (Human:), and is not split into their turns"
ECHOED = "an answer begins with its prompt, which is then learned with it"


class Texts(NamedTuple):
    """Content of a row.

    Attributes:
        conversations: conversations that differ in their last answer.
        judged: texts to score, or one that is learned whole.
        label: that of a text to score.
        margin, weight: those of a pair; NaN: none.
        ranks: of several answers; None: no two are tied.
        context: token ranges of answers that are not learned.
        last_only: only the last answer is learned.
        unread: filled columns and keys that were not used.
        notes: what the report should say of the row.
    """

    conversations: list[list[columns.Message]]
    judged: list[str]
    label: float = float("nan")
    margin: float = float("nan")
    weight: float = float("nan")
    ranks: Sequence[int] | None = None
    context: Sequence[tuple[int, int]] = ()
    last_only: bool = False
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def spelled(self) -> Iterator[str]:
        yield from self.judged
        yield from (m["content"] for messages in self.conversations for m in messages)


def texts_of(
    row: columns.Record, form: columns.Form | None, recipe: Recipe, template: Template
) -> Texts:
    """Texts that a row of this form holds for the recipe's task.

    Raises:
        Dropped: there is nothing to learn, or the template refuses it.
        Unreadable: a column is missing or has the wrong content.
    """
    if recipe.task == "prompt":
        asked = columns.question(row, ". Name one in data.columns, such as {prompt: question}")
        if not asked[-1]["content"].strip():
            raise Dropped("empty prompt")
        try:
            template.accepts([*asked, {"role": "assistant", "content": "x"}])
        except DataError as error:
            raise Dropped(str(error)) from error
        return Texts([asked], [])
    if recipe.task == "label":
        judged, label = columns.judged(row, form)
        if not all(text.strip() for text in judged):
            raise Dropped("empty text")
        return Texts([], judged, label)
    unlearned: set[int] = set()
    numbers: dict[str, float] = {}
    ranks: list[int] | None = None
    if recipe.task == "pair":
        before, sides, ranks = compared(row, form)
        has_margin = recipe.margin and len(form.columns) == 2  # type: ignore[union-attr]
        numbers = {name: _number(row, name) for name in ("margin", "weight")[not has_margin :]}
        sides, ranks = _comparable(sides, ranks, recipe.compared, row.notes)
        texts = [[*before, {"role": "assistant", "content": side}] for side in sides]
    else:
        if recipe.task == "rated":
            numbers = {"label": columns.label(row)}
        conversation, prompt = columns.conversation(row, form)
        unlearned = _unlearned(conversation, prompt, recipe)
        texts = [conversation]
        if recipe.reverse:
            texts = [_reversed(texts[0])]
        if form.columns == ("text",):  # type: ignore[union-attr]
            return Texts([], [_bare(conversation[0]["content"], row.notes, template)])
    for messages in texts:
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        judged = answers[-1:] if recipe.task == "pair" or recipe.last_turn_only else answers
        if not answers:
            # known names only, since each row could have other names, and so another reason
            known = columns.SPEAKERS.keys() & {turn["role"] for turn in messages} - {
                "user",
                "system",
            }
            such = f"; rename {', '.join(sorted(known))}" if known else ""
            raise Dropped(f"no turn has the role assistant{such}")
        if not all(judged):
            raise Dropped("empty answer")
        if recipe.last_turn_only and messages[-1]["role"] != "assistant":
            raise Dropped("no answer at the end")
        try:
            template.accepts(messages)
        except DataError as error:
            raise Dropped(str(error)) from error
    if all(map(_repeats, texts)):
        row.notes.append(ECHOED)
    plain = template.name == "plain"  # whose texts may hold turns on purpose
    if not plain and any(SPOKEN.match(turn["content"]) for turns in texts for turn in turns):
        row.notes.append(NOT_SPLIT)
    answered = [i for i, turn in enumerate(texts[0]) if turn["role"] == "assistant"]
    if unlearned.issuperset(answered) or (recipe.last_turn_only and answered[-1] in unlearned):
        raise Dropped("no answer to learn")
    last_only = recipe.task == "pair" or recipe.last_turn_only
    last_only |= unlearned == set(answered[:-1]) != set() and answered[-1] - 1 not in unlearned
    if last_only and answered[-1] - 1 in answered:  # no text of the template may lie between
        unlearned, last_only = {*unlearned, *answered[:-1]}, False
    context = [] if last_only or not unlearned else _context(texts[0], unlearned, template)
    return Texts(texts, [], ranks=ranks, context=context, last_only=last_only, **numbers)


def _bare(text: str, notes: list[str], template: Template) -> str:
    """A text that is learned whole; notes start and end tokens that are not written twice."""
    bare = template.bare(text)
    if not bare.strip():
        raise Dropped("empty text")
    if bare != text:
        notes.append(FRAMED)
    return bare


def _comparable(
    answers: Sequence[str], ranks: Sequence[int], compared: str, notes: list[str]
) -> tuple[list[str], list[int]]:
    """The answers that are compared, with their ranks; notes those that are empty or repeat a
    better one.

    Raises:
        Dropped: there are fewer than two of them, or all are tied.
    """
    written = [i for i, answer in enumerate(answers) if answer.strip()]
    kept = sorted({answers[i].strip(): i for i in reversed(written)}.values())
    if len(kept) < 2:
        same = len({answer.strip() for answer in answers}) == 1
        raise Dropped("identical answers" if same else "empty answer")
    if len(written) < len(answers):
        notes.append("an empty answer of several left out")
    if len(kept) < len(written):
        notes.append("an answer that repeats a better one left out")
    kept = [kept[n] for n in untied([ranks[i] for i in kept], compared)]
    return [answers[i] for i in kept], [ranks[i] for i in kept]


def _number(row: columns.Record, name: str) -> float:
    """A number from 0 in a column; NaN where the row has none."""
    if not row.filled(name):
        return float("nan")
    try:
        number = float(row[name])
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= float(np.finfo(np.float32).max):
        raise columns.Unreadable(f"column {name}: wanted a number from 0, found {row[name]!r}")
    return number


def _repeats(messages: Sequence[columns.Message]) -> bool:
    """Whether the last answer begins with its question, of several words."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return False
    asked, answer = (message["content"].strip() for message in messages[-2:])
    return answer.startswith(asked) and len(asked.split(maxsplit=3)) > 3


def _unlearned(messages: list[columns.Message], prompt: int, recipe: Recipe) -> set[int]:
    """Answers that are not learned: those in the prompt, and those that the row marks so."""
    marked = [i for i, turn in enumerate(messages) if not turn.pop("learned", True)]
    completion_only = recipe.completion_only_loss and not (recipe.padded or recipe.reverse)
    if marked and not (completion_only and recipe.assistant_only_loss):
        raise columns.Unreadable(
            "a message is marked not to be learned, which needs sft.completion_only_loss and "
            "sft.assistant_only_loss, and neither data.reverse nor data.compat"
        )
    before = range(prompt if completion_only else 0)
    return {i for i in (*marked, *before) if messages[i]["role"] == "assistant"}


def _context(
    messages: Sequence[columns.Message], unlearned: set[int], template: Template
) -> list[tuple[int, int]]:
    """Token ranges of the answers in `unlearned`, each from the end of the answer before it."""
    answered = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    try:
        encoded = template.encode([messages, *(messages[: i + 1] for i in answered)])
    except DataError as error:
        raise Dropped(str(error)) from error
    whole, *parts = (np.concatenate([tokens for tokens, _ in spans]) for spans in encoded)
    if not all(np.array_equal(part, whole[: len(part)]) for part in parts):
        raise Dropped("the template rewrites earlier turns, so none can be left unlearned")
    starts = [0, *(len(part) for part in parts)]
    return [(starts[n], starts[n + 1]) for n, turn in enumerate(answered) if turn in unlearned]


def first_exchange(messages: Sequence[columns.Message]) -> tuple[str, str]:
    """The first question of a conversation, and its answer.

    Raises:
        Dropped: it begins with something else.
    """
    turns = [message for message in messages if message["role"] in ("user", "assistant")]
    if [message["role"] for message in turns[:2]] != ["user", "assistant"]:
        raise Dropped("does not begin with a question and its answer")
    return turns[0]["content"], turns[1]["content"]


def _reversed(messages: Sequence[columns.Message]) -> list[columns.Message]:
    """Swap the first question and its answer: p(x|y) of Li et al. (2023), Self-Alignment with
    Instruction Backtranslation."""
    asked, answered = first_exchange(messages)
    return [{"role": "user", "content": answered}, {"role": "assistant", "content": asked}]
