"""Rows to examples: tokenise, truncate, and count every row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from easyaira.data import columns
from easyaira.data.answers import compared
from easyaira.data.examples import Account, Files, Parts, digest
from easyaira.data.recipe import Dropped, Recipe
from easyaira.data.shown import KEPT, show
from easyaira.data.sources import BadRow, Located
from easyaira.data.template import Template
from easyaira.data.truncate import CUT, fit, lengths_of, pad_parts, untied
from easyaira.errors import DataError, TokenizerError

CHUNK = 1000  # rows to tokenise together, on all cores
CHUNK_CHARACTERS = 2**21  # of them, at most, since each takes 200 bytes
LONGEST_TEXT = 2**21  # characters
FRAMED = "a text begins or ends with the token put there anyway, which is written once"
SPOKEN = re.compile(r"\s*(?:###\s*)?Human:.*\bAssistant:", re.DOTALL)
NOT_SPLIT = "a text names its speakers (Human:), and is not split into their turns"
REPEATED = "an answer begins with its prompt, which is then learned with it"


def build(
    rows: Iterable[Located], folder: Path, *, recipe: Recipe, template: Template, label: str
) -> Account:
    """Tokenise rows into files in `folder`, and count kept and dropped rows.

    Raises:
        DataError: a row is unreadable, unless recipe.on_bad_row is skip.
    """
    account = Account()
    rows = tqdm(rows, desc=f"tokenising {label}", unit=" rows", disable=None)
    with Files(folder) as files:
        for row, place, texts, parts in _tokenised(rows, account, recipe, template):
            try:
                fitted, notes = fit(parts, template, recipe)
            except Dropped as reason:
                account.drop(str(reason), place)
                show(account, place, parts, template, str(reason))
                continue
            if any(template.types_control(text) for text in texts.spelled):
                notes.append("a text spells a control token, which stays text")
            account.noted.update([*notes, *texts.notes])
            if any(note.startswith(CUT) for note in notes):
                account.cut[sum(lengths_of(parts))] += 1
            account.unread.update(texts.unread)
            show(account, place, fitted, template, "; ".join([KEPT, *notes, *texts.notes]))
            unseen = recipe.max_length - sum(lengths_of(fitted)) if recipe.padded else 0
            if unseen:
                fitted = pad_parts(fitted, unseen, template.tokenizer.pad_token_id)
            judged = [tokens for tokens, _ in parts.answers] if texts.judged else []
            prompt_id = digest(parts.prompt, *judged)  # these texts have no prompt
            numbers = {"labels": texts.label, "margins": texts.margin, "weights": texts.weight}
            known = {"rows": row, "prompt_ids": prompt_id, "sources": 0, "unseen": unseen}
            files.add(fitted, **known, **numbers)
            account.kept += 1
    (folder / "account.json").write_text(json.dumps(vars(account)), encoding="utf-8")
    return account


def _readable(
    rows: Iterable[Located], account: Account, recipe: Recipe, template: Template
) -> Iterator[tuple[int, str, Texts]]:
    """Yield readable rows with index and place; count the others, or raise DataError."""
    form = None
    for place, row in rows:
        account.read += 1
        try:
            if isinstance(row, BadRow):
                raise columns.Unreadable(row.reason)
            if recipe.task != "prompt":
                form = form or _form(row, recipe.task, place)
            record = columns.Record(row)
            texts = _texts(record, form, recipe, template)
            if (longest := max(map(len, texts.spelled), default=0)) > LONGEST_TEXT:
                raise columns.Unreadable(
                    f"a text of {longest:,} characters, more than {LONGEST_TEXT:,}; split it"
                )
            unread = tuple(dict.fromkeys(record.unread()))
            texts = texts._replace(unread=unread, notes=tuple(dict.fromkeys(record.notes)))
            yield account.read - 1, place, texts
        except columns.Unreadable as error:
            if recipe.on_bad_row == "error":
                raise DataError(
                    f"{place}: {error}. Fix the row, or set data.on_bad_row to skip"
                ) from error
            account.drop("unreadable", place)
        except Dropped as reason:
            account.drop(str(reason), place)
        except TokenizerError as error:
            raise TokenizerError(f"{place}: {error}") from error


def _tokenised(
    rows: Iterable[Located], account: Account, recipe: Recipe, template: Template
) -> Iterator[tuple[int, str, Texts, Parts]]:
    """Yield readable rows with their tokens, tokenised in chunks so that all cores are used."""
    readable = _readable(rows, account, recipe, template)
    for chunk in _chunks(readable):
        for read, parts in zip(chunk, _located_parts(chunk, recipe, template), strict=True):
            yield *read, parts


def _chunks(readable: Iterable[tuple[int, str, Texts]]) -> Iterator[list[tuple[int, str, Texts]]]:
    """Group rows by CHUNK, or fewer where they are long."""
    chunk, characters = [], 0
    for row in readable:
        chunk.append(row)
        characters += sum(map(len, row[2].spelled))
        if len(chunk) == CHUNK or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _form(row: Any, task: str, place: str) -> columns.Form:
    try:
        return columns.form_of(list(row), task)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


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


def _texts(
    row: columns.Record, form: columns.Form | None, recipe: Recipe, template: Template
) -> Texts:
    if recipe.task == "prompt":
        asked = columns.question(row)
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
            raise Dropped("no turn has the role assistant")
        if not all(judged):
            raise Dropped("empty answer")
        if recipe.last_turn_only and messages[-1]["role"] != "assistant":
            raise Dropped("no answer at the end")
        try:
            template.accepts(messages)
        except DataError as error:
            raise Dropped(str(error)) from error
    if all(map(_repeats, texts)):
        row.notes.append(REPEATED)
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
        Dropped: there are no two of them, or all are tied.
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


def _located_parts(
    readable: Sequence[tuple[int, str, Texts]], recipe: Recipe, template: Template
) -> list[Parts]:
    """Tokenise rows; an error of the tokenizer names its row."""
    try:
        return list(_parts(readable, recipe, template))
    except TokenizerError as error:
        if len(readable) == 1:
            raise TokenizerError(f"{readable[0][1]}: {error}") from error
        return [parts for row in readable for parts in _located_parts([row], recipe, template)]


def _parts(
    readable: Sequence[tuple[int, str, Texts]], recipe: Recipe, template: Template
) -> Iterator[Parts]:
    if recipe.task == "label":
        encoded = iter(template.judged([text for *_, texts in readable for text in texts.judged]))
        empty = np.zeros(0, np.int32)
        for *_, texts in readable:
            sides = [next(encoded) for _ in texts.judged]
            answers = [(tokens, np.zeros(len(tokens), bool)) for tokens in sides]
            yield Parts(empty, empty.astype(bool), answers)
        return
    conversations = [messages for *_, texts in readable for messages in texts.conversations]
    if recipe.task == "prompt":
        nothing = np.zeros(0, np.int32), np.zeros(0, bool)
        for messages in conversations:
            tokens = template.prompt(messages)
            yield Parts(tokens, np.zeros(len(tokens), bool), [nothing])
        return
    whole = [text for *_, texts in readable for text in texts.judged]
    encoded = iter(template.whole(whole) or template.encode(conversations))
    for *_, texts in readable:
        sides = [_split(next(encoded), texts, recipe) for _ in texts.judged or texts.conversations]
        yield Parts(*sides[0][:2], [answer for *_, answer in sides], ranks=texts.ranks)


Answer = tuple[np.ndarray, np.ndarray]  # tokens, learned


def _split(
    spans: list[tuple[np.ndarray, bool]], texts: Texts, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray, Answer]:
    """Split a conversation into prompt and answer at the start of the first learned answer."""
    if texts.context:
        spans = _without(spans, texts.context)
    answers = [i for i, (_, is_answer) in enumerate(spans) if is_answer]
    first = answers[-1] if texts.last_only else answers[0]
    prompt = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in spans[:first])])
    everything = recipe.padded
    prompt_learned = np.full(len(prompt), everything or not recipe.completion_only_loss)
    answer = [
        (tokens, np.full(len(tokens), is_answer or everything or not recipe.assistant_only_loss))
        for tokens, is_answer in spans[first:]
    ]
    tokens, learned = (np.concatenate(arrays) for arrays in zip(*answer, strict=True))
    return prompt, prompt_learned, (tokens, learned)


def _without(
    spans: list[tuple[np.ndarray, bool]], ranges: Sequence[tuple[int, int]]
) -> list[tuple[np.ndarray, bool]]:
    """The spans with nothing learned in `ranges`."""
    tokens = np.concatenate([tokens for tokens, _ in spans])
    learned = np.concatenate([np.full(len(tokens), flag) for tokens, flag in spans])
    for start, end in ranges:
        learned[start:end] = False
    edges = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1), len(tokens)]
    return [(tokens[a:b], bool(learned[a])) for a, b in pairwise(edges)]
