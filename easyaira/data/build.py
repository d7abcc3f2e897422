"""Rows to examples: tokenised, cut to length, and every row accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from easyaira.config import DataConfig, SFTConfig
from easyaira.data import schemas
from easyaira.data.examples import Account, Files, Parts, digest
from easyaira.data.sources import BadRow, Located
from easyaira.data.templates import Template
from easyaira.errors import ConfigError, DataError

CHUNK = 1000  # rows that are tokenised together, on all cores
SHOWN = 12  # rows that a report shows
KEPT = "trained on"


@dataclass(frozen=True)
class Recipe:
    """What becomes of a row; together with template and tokenizer it decides every token.

    Attributes:
        task: what a row is: a conversation to be learned, a pair of answers, a text to be judged.
        max_length: longest prompt with answer, in tokens.
        max_prompt_length: a longer prompt keeps its start token and its last tokens.
        truncation: what happens above max_length.
        reverse: the prompt is learned, given the answer.
        completion_only_loss, assistant_only_loss, last_turn_only: what is learned of a
            conversation, see config.SFTConfig.
        padded: as in Aira's original scripts, everything is learned, and padding to max_length too.
        on_bad_row: error or skip.
    """

    task: Literal["conversation", "pair", "label"]
    max_length: int
    max_prompt_length: int | None = None
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    reverse: bool = False
    completion_only_loss: bool = True
    assistant_only_loss: bool = True
    last_turn_only: bool = False
    padded: bool = False
    on_bad_row: Literal["error", "skip"] = "error"


def recipe_of(task: str, data: DataConfig, max_length: int, sft: SFTConfig | None = None) -> Recipe:
    """The recipe that a configuration asks for.

    Raises:
        ConfigError: an option that the task does not have.
    """
    if task != "conversation":
        for name in ("compat", "reverse"):
            if getattr(data, name):
                raise ConfigError(f"data.{name}: is for SFT and for nothing else; leave it out")
    if task != "pair" and data.share_prompt == "always":
        raise ConfigError("data.share_prompt: only pairs have a prompt to share; leave it out")
    return Recipe(
        task,
        max_length,
        data.max_prompt_length,
        data.truncation,
        reverse=data.reverse,
        padded=data.compat == "aira",
        on_bad_row=data.on_bad_row,
        **(asdict(sft) if sft else {}),
    )


class Dropped(Exception):
    """A row that cannot be trained on, with the reason."""


def build(
    rows: Iterable[Located], folder: Path, *, recipe: Recipe, template: Template, label: str
) -> Account:
    """Tokenise rows into files in `folder`, and count what became of each.

    Raises:
        DataError: a row that cannot be read, unless recipe.on_bad_row says to go on.
    """
    account = Account()
    rows = tqdm(rows, desc=f"tokenising {label}", unit=" rows", disable=None)
    with Files(folder) as files:
        for row, place, texts, parts in _tokenised(rows, account, recipe, template):
            try:
                fitted, notes = _fit(parts, template, recipe)
            except Dropped as reason:
                account.drop(str(reason), place)
                _show(account, place, parts, template, str(reason))
                continue
            if any(template.types_control(text) for text in texts.spelled):
                notes.append("a text spells a control token, which stays text")
            account.noted.update(notes)
            _show(account, place, fitted, template, "; ".join([KEPT, *notes]))
            unseen = recipe.max_length - sum(_lengths(fitted)) if recipe.padded else 0
            if unseen:
                fitted = _padded(fitted, unseen, template.tokenizer.pad_token_id)
            judged = [tokens for tokens, _ in parts.answers] if recipe.task == "label" else []
            prompt_id = digest(parts.prompt, *judged)  # texts without a prompt are their own
            known = {"rows": row, "prompt_ids": prompt_id, "labels": texts.label}
            files.add(fitted, sources=0, unseen=unseen, **known)
            account.kept += 1
    (folder / "account.json").write_text(json.dumps(vars(account)), encoding="utf-8")
    return account


def _readable(
    rows: Iterable[Located], account: Account, recipe: Recipe, template: Template
) -> Iterator[tuple[int, str, Texts]]:
    """The rows that can be read, by number and place; the others are counted, or an error."""
    form = None
    for place, row in rows:
        account.read += 1
        try:
            if isinstance(row, BadRow):
                raise schemas.Unreadable(row.reason)
            form = form or _form(row, recipe.task, place)
            yield account.read - 1, place, _texts(row, form, recipe, template)
        except schemas.Unreadable as error:
            if recipe.on_bad_row == "error":
                raise DataError(
                    f"{place}: {error}. Mend the row, or set data.on_bad_row to skip"
                ) from error
            account.drop("unreadable", place)
        except Dropped as reason:
            account.drop(str(reason), place)


def _tokenised(
    rows: Iterable[Located], account: Account, recipe: Recipe, template: Template
) -> Iterator[tuple[int, str, Texts, Parts]]:
    """The same with their tokens, many at a time, since the tokenizer uses all cores."""
    readable = _readable(rows, account, recipe, template)
    while chunk := list(islice(readable, CHUNK)):
        for read, parts in zip(chunk, _parts(chunk, recipe, template), strict=True):
            yield *read, parts


def _form(row: Any, task: str, place: str) -> schemas.Form:
    try:
        return schemas.form_of(list(row), task)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


class Texts(NamedTuple):
    """What a row says: conversations that differ in their last answer, or texts to be judged."""

    conversations: list[list[schemas.Message]]
    judged: list[str]
    label: float = float("nan")

    @property
    def spelled(self) -> Iterator[str]:
        yield from self.judged
        yield from (m["content"] for messages in self.conversations for m in messages)


def _texts(row: Any, form: schemas.Form, recipe: Recipe, template: Template) -> Texts:
    if recipe.task == "label":
        judged, label = schemas.judged(row, form)
        if not all(text.strip() for text in judged):
            raise Dropped("empty text")
        return Texts([], judged, label)
    if recipe.task == "pair":
        before, *sides = schemas.pair(row, form)
        if sides[0].strip() == sides[1].strip():
            raise Dropped("identical answers")
        texts = [[*before, {"role": "assistant", "content": side}] for side in sides]
    else:
        texts = [schemas.conversation(row, form)]
        if recipe.reverse:
            texts = [_reversed(texts[0])]
    for messages in texts:
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        judged = answers[-1:] if recipe.task == "pair" or recipe.last_turn_only else answers
        if not answers or not all(judged):
            raise Dropped("empty answer")
        if recipe.last_turn_only and messages[-1]["role"] != "assistant":
            raise Dropped("no answer at the end")
        try:
            template.accepts(messages)
        except DataError as error:
            raise Dropped(str(error)) from error
    return Texts(texts, [])


def _reversed(messages: list[schemas.Message]) -> list[schemas.Message]:
    """The first answer as the prompt, and what asked for it as the answer: p(x|y) of Li et al.
    (2023), Self-Alignment with Instruction Backtranslation."""
    turns = [message for message in messages if message["role"] in ("user", "assistant")]
    if [message["role"] for message in turns[:2]] != ["user", "assistant"]:
        raise Dropped("does not begin with a question and its answer")
    asked, answered = (message["content"] for message in turns[:2])
    return [{"role": "user", "content": answered}, {"role": "assistant", "content": asked}]


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
    encoded = iter(template.encode(conversations))
    for *_, texts in readable:
        sides = [_split(next(encoded), recipe) for _ in texts.conversations]
        yield Parts(*sides[0][:2], [answer for *_, answer in sides])


Answer = tuple[np.ndarray, np.ndarray]  # tokens, learned


def _split(
    spans: list[tuple[np.ndarray, bool]], recipe: Recipe
) -> tuple[np.ndarray, np.ndarray, Answer]:
    """A conversation as its prompt and its answer: all that follows the first answer's start, or
    the last one's."""
    answers = [i for i, (_, is_answer) in enumerate(spans) if is_answer]
    last_only = recipe.task == "pair" or recipe.last_turn_only
    first = answers[-1] if last_only else answers[0]
    prompt = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in spans[:first])])
    everything = recipe.padded
    prompt_learned = np.full(len(prompt), everything or not recipe.completion_only_loss)
    prompt_learned[:1] = False  # nothing stands before a first token
    answer = [
        (tokens, np.full(len(tokens), is_answer or everything or not recipe.assistant_only_loss))
        for tokens, is_answer in spans[first:]
    ]
    tokens, learned = (np.concatenate(arrays) for arrays in zip(*answer, strict=True))
    return prompt, prompt_learned, (tokens, learned)


def _padded(parts: Parts, count: int, pad: int) -> Parts:
    """With padding behind the answer, which is learned."""
    (tokens, learned) = parts.answers[0]
    more = (np.full(count, pad, np.int32), np.ones(count, bool))
    return parts._replace(
        answers=[(np.concatenate([tokens, more[0]]), np.concatenate([learned, more[1]]))]
    )


def _lengths(parts: Parts) -> tuple[int, int]:
    """Tokens of the prompt, and of the longest answer."""
    return len(parts.prompt), max(len(tokens) for tokens, _ in parts.answers)


def _fit(parts: Parts, template: Template, recipe: Recipe) -> tuple[Parts, list[str]]:
    """Prompt and answers within the lengths, and what was done for it; both sides are cut alike.

    Raises:
        Dropped: it does not fit, or nothing to learn is left.
    """
    prompt, prompt_learned, answers, _ = parts
    start = int(len(prompt) > 0 and int(prompt[0]) in template.controls.values())
    notes = []

    def last_of_prompt(length: int) -> np.ndarray:
        """Which tokens stay: the start token and the last ones."""
        index = np.arange(len(prompt))
        return (index < start) | (index >= len(prompt) - (length - start))

    kept = np.ones(len(prompt), bool)
    if recipe.max_prompt_length and len(prompt) > recipe.max_prompt_length:
        kept = last_of_prompt(recipe.max_prompt_length)
        notes.append("prompt cut to max_prompt_length")
    tails = [np.zeros(0, np.int32)] * len(answers)
    _, longest = _lengths(parts)
    if kept.sum() + longest > recipe.max_length:
        if recipe.truncation == "drop":
            raise Dropped("longer than max_length")
        if recipe.truncation == "keep_end" and recipe.task != "label":
            if longest + start >= recipe.max_length:
                raise Dropped("answer as long as max_length")
            kept = last_of_prompt(recipe.max_length - longest)
        else:
            room = max(recipe.max_length - int(kept.sum()), 0)
            closing = int(template.encoder and room > 0)  # as their tokenizers do when they cut

            def keeps(tokens: np.ndarray) -> np.ndarray:
                place, length = np.arange(len(tokens)), len(tokens)
                return (length <= room) | (place < room - closing) | (place >= length - closing)

            tails = [tokens[~keeps(tokens)] for tokens, _ in answers]
            answers = [(tokens[keeps(tokens)], mask[keeps(tokens)]) for tokens, mask in answers]
        notes.append(f"cut to max_length ({recipe.truncation})")
    lost, prompt, prompt_learned = prompt[~kept], prompt[kept], prompt_learned[kept]
    if recipe.task != "label":
        if not all(mask[0 if len(prompt) else 1 :].any() for _, mask in answers):
            raise Dropped("nothing left to learn within max_length")
    if len(answers) == 2 and np.array_equal(answers[0][0], answers[1][0]):
        raise Dropped("identical answers")
    return Parts(prompt, prompt_learned, list(answers), (lost, *tails)), notes


def _show(account: Account, place: str, parts: Parts, template: Template, became: str) -> None:
    """Keep the first rows, and the first of each kind that was cut or dropped, for a report."""
    of_kind = sum(kind == became for _, kind, _ in account.shown)
    if of_kind >= (SHOWN if became == KEPT else 2):
        return
    cut = parts.cut or (np.zeros(0, np.int32),) * (1 + len(parts.answers))
    before = [(cut[0], ["cut"] * len(cut[0])), (parts.prompt, _states(parts.prompt_learned))]
    told: list[list[str]] = []
    for side, (tokens, learned) in enumerate(parts.answers):
        tail = cut[1 + side]
        spans = [*before, (tokens, _states(learned)), (tail, ["cut"] * len(tail))]
        texts = template.pieces(np.concatenate([tokens for tokens, _ in spans]))
        pairs = list(zip(texts, (state for _, states in spans for state in states), strict=True))
        known = len(cut[0]) + len(parts.prompt)
        told += [list(pair) for pair in pairs[: 0 if side else known]]
        if len(parts.answers) == 2:
            told.append([("chosen", "rejected")[side], "side"])
        told += [list(pair) for pair in pairs[known:]]
    if not became.startswith(KEPT):
        told = [[text, state if state == "side" else "cut"] for text, state in told]
    account.shown.append([place, became, told])


def _states(learned: np.ndarray) -> list[str]:
    return ["trained" if is_learned else "masked" for is_learned in learned]
