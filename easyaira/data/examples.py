"""Rows to examples: tokenised, cut to length, and every row accounted for.

An example is a prompt with one answer (SFT), with two (DPO: chosen, rejected), or texts to be
judged. All lie one after another in flat arrays on disk, so that a million of them cost no memory
but their bounds.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from easyaira.config import DataConfig, SFTConfig
from easyaira.data import schemas
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


@dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        tokens: [total] all prompts and answers.
        learned: [total] which of them carry loss.
        bounds: [n, answers + 2] where the prompt and each answer of an example start, and its end.
        rows: [n] the row of its source that an example comes from, counted from 0.
        sources: [n] the source.
        prompt_ids: [n] a hash of each prompt before any cut; equal prompts are never split apart.
        ids: [n] a hash of prompt and answers as they are trained on.
        unseen: [n] so many of an example's last tokens are padding that no token may look at.
        learned_counts: [n] tokens that carry loss.
        labels: [n] of texts to be judged; NaN elsewhere.
    """

    tokens: np.ndarray
    learned: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray
    sources: np.ndarray
    prompt_ids: np.ndarray
    ids: np.ndarray
    unseen: np.ndarray
    learned_counts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def answers(self) -> int:
        return self.bounds.shape[1] - 2

    def lengths(self) -> np.ndarray:
        """[n, answers] tokens of the prompt with each answer."""
        prompt = self.bounds[:, 1] - self.bounds[:, 0]
        return prompt[:, None] + np.diff(self.bounds[:, 1:])

    def take(self, index: np.ndarray) -> Examples:
        return replace(self, **{name: getattr(self, name)[index] for name in PER_EXAMPLE})

    def fingerprint(self) -> str:
        """Of the examples and their order."""
        digest = hashlib.sha256()
        for values in (self.ids, self.bounds[:, -1] - self.bounds[:, 0], self.unseen):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:16]


PER_EXAMPLE = {
    "bounds": np.int64,
    "rows": np.int64,
    "sources": np.int16,
    "prompt_ids": np.uint64,
    "ids": np.uint64,
    "unseen": np.int32,
    "learned_counts": np.int32,
    "labels": np.float32,
}
PER_TOKEN = {"tokens": np.int32, "learned": np.bool_}


@dataclass
class Account:
    """What became of the rows that were read: kept + dropped = read.

    Attributes:
        dropped: reason -> rows; `first_dropped`: reason -> the place of the first of them.
        noted: what happened to rows that were kept -> rows.
        shown: the first rows, as [place, what became of it, [[text, state], ...]] for a report.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    noted: Counter = field(default_factory=Counter)
    shown: list[list[Any]] = field(default_factory=list)

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, place)

    def __add__(self, other: Account) -> Account:
        return Account(
            self.read + other.read,
            self.kept + other.kept,
            self.dropped + other.dropped,
            other.first_dropped | self.first_dropped,
            self.noted + other.noted,
            self.shown + other.shown,
        )

    def told(self) -> str:
        reasons = [
            f"{n} {reason} (first: {self.first_dropped[reason]})"
            for reason, n in self.dropped.items()
        ]
        return f"{self.kept} of {self.read} rows" + (
            f"; dropped {', '.join(reasons)}" if reasons else ""
        )

    def check(self, max_dropped: float) -> None:
        """Raises DataError if nothing, or too little, is left."""
        lost = self.read - self.kept
        if not self.kept or lost > max_dropped * self.read:
            raise DataError(
                f"data: only {self.told()}; allowed is a share of {max_dropped}. Mend the rows, or "
                "raise data.max_dropped"
            )


class Dropped(Exception):
    """A row that cannot be trained on, with the reason."""


class Parts(NamedTuple):
    """An example before it is stored: tokens, and which are learned.

    Attributes:
        prompt, prompt_learned: what stands before the answers.
        answers: (tokens, learned) of each.
        cut: tokens that were cut off, for a report: of the prompt, and of each answer.
    """

    prompt: np.ndarray
    prompt_learned: np.ndarray
    answers: list[tuple[np.ndarray, np.ndarray]]
    cut: tuple[np.ndarray, ...] = ()


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
            prompt_id = _hash(parts.prompt, *judged)  # texts without a prompt are their own
            known = {"rows": row, "prompt_ids": prompt_id, "labels": texts.label}
            files.add(fitted, sources=0, unseen=unseen, **known)
            account.kept += 1
    (folder / "account.json").write_text(json.dumps(vars(account)), encoding="utf-8")
    return account


class Files:
    """Examples as they are written, one by one: tokens to disk, the rest when all is done."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._held = {name: array(np.dtype(kind).char) for name, kind in PER_EXAMPLE.items()}
        self._end, self._columns = 0, 3

    def __enter__(self) -> Files:
        self._tokens, self._learned = (
            open(self.folder / f"{name}.bin", "wb") for name in PER_TOKEN
        )
        return self

    def add(self, parts: Parts, **known: float) -> None:
        """One example, and what is known of it."""
        flat = [(parts.prompt, parts.prompt_learned), *parts.answers]
        ends = [self._end]
        for tokens, learned in flat:
            self._tokens.write(tokens.astype(PER_TOKEN["tokens"]).tobytes())
            self._learned.write(learned.astype(PER_TOKEN["learned"]).tobytes())
            ends.append(ends[-1] + len(tokens))
        self._end, self._columns = ends[-1], len(ends)
        known["ids"] = _hash(*(values for part in flat for values in part))
        known["learned_counts"] = sum(int(learned.sum()) for _, learned in flat)
        self._held["bounds"].extend(ends)
        for name, value in known.items():
            self._held[name].append(value)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._tokens.close()
        self._learned.close()
        if kind is None:
            for name, dtype in PER_EXAMPLE.items():
                values = np.array(self._held[name], dtype)
                values = values.reshape(-1, self._columns) if name == "bounds" else values
                np.save(self.folder / f"{name}.npy", values)


def open_folder(folder: Path) -> tuple[Examples, Account]:
    """What `build` wrote, without reading the tokens.

    Raises:
        ValueError, OSError: the files are not whole.
    """
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in PER_EXAMPLE}
    total = int(arrays["bounds"][-1, -1]) if len(arrays["bounds"]) else 0
    for name, kind in PER_TOKEN.items():
        file = folder / f"{name}.bin"
        if file.stat().st_size != total * np.dtype(kind).itemsize:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, not those of {total} tokens")
        arrays[name] = np.memmap(file, kind, "r").view(np.ndarray) if total else np.zeros(0, kind)
    saved = json.loads((folder / "account.json").read_text(encoding="utf-8"))
    counted = {name: Counter(saved.pop(name)) for name in ("dropped", "noted")}
    return Examples(**arrays), Account(**saved, **counted)


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


def _hash(*arrays: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for values in arrays:
        digest.update(len(values).to_bytes(8, "little"))
        digest.update(values.tobytes())
    return int.from_bytes(digest.digest(), "little")


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
