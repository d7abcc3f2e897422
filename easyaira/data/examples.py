"""Examples on disk: flat files of concatenated tokens, and per-example arrays.

An example is a prompt with K answers (SFT: one; pairs: chosen and rejected; more, best first), or
texts to score. An example with fewer answers than another has empty ones at its end. Tokens are
memory-mapped, so only the per-example arrays take memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from easyaira.errors import DataError, TokenizerError


@dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        tokens: [total] tokens of all prompts and answers.
        learned: [total] tokens with loss.
        bounds: [n, answers + 2] start of the prompt, start of each answer, and end of the example.
        ranks: [n, answers] rank of each answer, best first; equal ones are tied; -1: no answer.
        rows: [n] row of the source, from 0.
        sources: [n] index of the source.
        prompt_ids: [n] hash of the prompt before truncation; equal prompts stay in one split.
        ids: [n] hash of prompt and answers after truncation, and of the numbers of the row.
        unseen: [n] number of padding tokens at the end, which no token attends to.
        learned_counts: [n] number of tokens with loss.
        labels: [n] labels of texts to score; NaN elsewhere.
        margins, weights: [n] margin and weight of a pair; NaN where its row has none.
    """

    tokens: np.ndarray
    learned: np.ndarray
    bounds: np.ndarray
    ranks: np.ndarray
    rows: np.ndarray
    sources: np.ndarray
    prompt_ids: np.ndarray
    ids: np.ndarray
    unseen: np.ndarray
    learned_counts: np.ndarray
    labels: np.ndarray
    margins: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def answers(self) -> int:
        return self.bounds.shape[1] - 2

    def lengths(self) -> np.ndarray:
        """[n, answers] length of the prompt with each answer; 0 where there is no answer."""
        prompt = self.bounds[:, 1] - self.bounds[:, 0]
        return (prompt[:, None] + np.diff(self.bounds[:, 1:])) * self.exists

    @property
    def exists(self) -> np.ndarray:
        """[n, answers] whether there is such an answer."""
        return self.ranks >= 0

    def widened(self, answers: int) -> Examples:
        """The same examples with room for this many answers."""
        room = [(0, 0), (0, answers - self.answers)]
        bounds = np.pad(self.bounds, room, mode="edge")
        return replace(self, bounds=bounds, ranks=np.pad(self.ranks, room, constant_values=-1))

    def take(self, index: np.ndarray) -> Examples:
        return replace(self, **{name: getattr(self, name)[index] for name in PER_EXAMPLE})

    def fingerprint(self) -> str:
        """Hash of the examples and their order."""
        hasher = hashlib.sha256()
        numbers = [values for values in (self.margins, self.weights) if not np.isnan(values).all()]
        lengths = self.bounds[:, -1] - self.bounds[:, 0]
        ranks = [self.ranks] if self.answers > 2 else []
        for values in (self.ids, lengths, self.unseen, *numbers, *ranks):
            hasher.update(np.ascontiguousarray(values).tobytes())
        return hasher.hexdigest()[:16]


PER_EXAMPLE = {
    "bounds": np.int64,
    "ranks": np.int16,
    "rows": np.int64,
    "sources": np.int16,
    "prompt_ids": np.uint64,
    "ids": np.uint64,
    "unseen": np.int32,
    "learned_counts": np.int32,
    "labels": np.float32,
    "margins": np.float32,
    "weights": np.float32,
}
OF_ANSWERS = {"bounds": 2, "ranks": 0}  # arrays per answer, and their further columns
OF_ROWS = ("labels", "margins", "weights")  # numbers that a row may have
PER_TOKEN = {"tokens": np.int32, "learned": np.bool_}


REPEATED, TRAINED = "repeats an earlier row", "also in data.train"  # reasons to drop a row


@dataclass
class Account:
    """Counts of rows: read = kept + dropped.

    Attributes:
        read, kept: number of rows.
        dropped: reason -> number of rows.
        first_dropped: reason -> place of the first such row.
        noted: change made to kept rows, such as a cut -> number of rows.
        unread: filled column or key that was not used -> number of kept rows.
        cut: length in tokens of a row before its cut to max_length -> number of such rows.
        shown: some rows for a report, as [place, outcome, [[text, state, token id], ...]].
    """

    read: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    noted: Counter = field(default_factory=Counter)
    unread: Counter = field(default_factory=Counter)
    cut: Counter = field(default_factory=Counter)
    shown: list[list[Any]] = field(default_factory=list)

    def __post_init__(self):  # JSON has no Counter
        for name in ("dropped", "noted", "unread"):
            setattr(self, name, Counter(getattr(self, name)))
        self.cut = Counter({int(length): count for length, count in self.cut.items()})

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
            self.unread + other.unread,
            self.cut + other.cut,
            self.shown + other.shown,
        )

    def length_for(self, share: float) -> int | None:
        """Shortest max_length that leaves this share of the kept rows whole; None: the current."""
        whole, wanted = self.kept - self.cut.total(), None
        for length, count in sorted(self.cut.items()):
            if whole >= share * self.kept:
                break
            whole, wanted = whole + count, length
        return wanted

    def summary(self) -> str:
        reasons = [
            f"{n} {reason} (first: {self.first_dropped[reason]})"
            for reason, n in self.dropped.items()
        ]
        return f"{self.kept} of {self.read} rows" + (
            f"; dropped {', '.join(reasons)}" if reasons else ""
        )

    def check(self, max_dropped: float) -> None:
        """Raise DataError if no row was kept, or more than `max_dropped` were dropped. A repeat
        is not lost, since its first row is kept."""
        lost = self.read - self.kept - self.dropped[REPEATED] - self.dropped[TRAINED]
        if not self.kept or lost > max_dropped * self.read:
            fix = ["Fix the rows"]
            if any(reason.startswith("the template") for reason in self.dropped):
                fix.append("choose another data.template")
            if any("max_length" in reason for reason in self.dropped):
                fix.append("raise data.max_length")
            if any("no room" in reason for reason in self.dropped):
                fix += ["lower rl.max_completion_length", "set data.max_prompt_length"]
            if any("min_length" in reason for reason in self.dropped):
                fix.append("lower data.min_length")
            if TRAINED in self.dropped:
                fix.append("name other rows in data.eval")
            if self.kept:
                fix.append("raise data.max_dropped")
            raise DataError(
                f"data: only {self.summary()}; the allowed share is {max_dropped}. "
                + ", or ".join(fix)
            )


class Parts(NamedTuple):
    """An example before it is stored: tokens and their loss masks.

    Attributes:
        prompt, prompt_learned: tokens before the answers, and which have loss.
        answers: (tokens, learned) of each answer.
        ranks: of the answers; default: none of them are tied.
        cut: truncated tokens for a report: those of the prompt, then those of each answer.
    """

    prompt: np.ndarray
    prompt_learned: np.ndarray
    answers: list[tuple[np.ndarray, np.ndarray]]
    cut: tuple[np.ndarray, ...] = ()
    ranks: Sequence[int] | None = None


def of_parts(parts: Sequence[Parts]) -> Examples:
    """Examples in memory, of no source. All have the same number of answers."""
    flat = [part for one in parts for part in ((one.prompt, one.prompt_learned), *one.answers)]
    ends = np.cumsum([0, *(len(tokens) for tokens, _ in flat)])
    spans = len(flat) // len(parts)
    per_example = {
        name: np.full(len(parts), np.nan if name in OF_ROWS else 0, kind)
        for name, kind in PER_EXAMPLE.items()
    }
    per_example["bounds"] = np.stack([ends[i : i + spans + 1] for i in range(0, len(flat), spans)])
    per_example["ranks"] = np.tile(np.arange(spans - 1, dtype=np.int16), (len(parts), 1))
    tokens, learned = (np.concatenate(values) for values in zip(*flat, strict=True))
    return Examples(tokens.astype(PER_TOKEN["tokens"]), learned, **per_example)


class Files:
    """Writer of examples: writes tokens at once, and per-example arrays on exit."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._held = {name: array(np.dtype(kind).char) for name, kind in PER_EXAMPLE.items()}
        self._end = 0
        self._counts = array("l")  # answers of each example

    def __len__(self) -> int:
        return len(self._counts)

    def __enter__(self) -> Files:
        self._tokens, self._learned = (
            open(self.folder / f"{name}.bin", "wb") for name in PER_TOKEN
        )
        return self

    def add(self, parts: Parts, **known: float) -> None:
        """Write one example; `known` are its further values of the per-example arrays."""
        flat = [(parts.prompt, parts.prompt_learned), *parts.answers]
        ends = [self._end]
        for tokens, learned in flat:
            self._tokens.write(tokens.astype(PER_TOKEN["tokens"]).tobytes())
            self._learned.write(learned.astype(PER_TOKEN["learned"]).tobytes())
            ends.append(ends[-1] + len(tokens))
        self._end = ends[-1]
        self._counts.append(len(parts.answers))
        self._held["ranks"].extend(parts.ranks or range(len(parts.answers)))
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
                if name in OF_ANSWERS:
                    values = self._by_example(values, name)
                np.save(self.folder / f"{name}.npy", values)

    def _by_example(self, values: np.ndarray, name: str) -> np.ndarray:
        """Values of all answers as rows, one per example, as long as the longest."""
        further = OF_ANSWERS[name]
        counts = np.array(self._counts, np.int64) + further
        place = np.arange(np.max(counts, initial=1 + further))
        starts = np.cumsum(counts) - counts
        rows = values[starts[:, None] + np.minimum(place, counts[:, None] - 1)]
        return rows if name == "bounds" else np.where(place < counts[:, None], rows, -1)


def of_tokens(
    prompts: Sequence[Any],
    answers: Sequence[Sequence[Any]],
    rows: Sequence[int] | None = None,
) -> Examples:
    """Examples of tokens in memory; every token of an answer has loss.

    Args:
        prompts: tokens of each prompt, as lists or arrays.
        answers: tokens of the answers to each prompt, the same number of answers for all.
        rows: row of each example, for messages; default: its index.
    """

    def tokens_of(given: Any, learned: bool) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(given, np.int32), np.full(len(given), learned)

    parts = [
        Parts(*tokens_of(prompt, False), [tokens_of(answer, True) for answer in own])
        for prompt, own in zip(prompts, answers, strict=True)
    ]
    numbers = np.arange(len(parts))
    return replace(
        of_parts(parts),
        rows=numbers if rows is None else np.asarray(rows, np.int64),
        prompt_ids=numbers.astype(np.uint64),
        ids=numbers.astype(np.uint64),
        learned_counts=np.array([sum(map(len, own)) for own in answers], np.int32),
    )


def open_folder(folder: Path) -> tuple[Examples, Account]:
    """Open a folder written by tokenise.build, without reading the tokens."""
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in PER_EXAMPLE}
    total = int(arrays["bounds"][-1, -1]) if len(arrays["bounds"]) else 0
    for name, kind in PER_TOKEN.items():
        file = folder / f"{name}.bin"
        arrays[name] = np.memmap(file, kind, "r").view(np.ndarray) if total else np.zeros(0, kind)
    saved = json.loads((folder / "account.json").read_text(encoding="utf-8"))
    counted = {name: Counter(saved.pop(name)) for name in ("dropped", "noted")}
    return Examples(**arrays), Account(**saved, **counted)


def digest(*arrays: np.ndarray) -> int:
    """64-bit hash of arrays and their lengths."""
    hasher = hashlib.blake2b(digest_size=8)
    for values in arrays:
        hasher.update(len(values).to_bytes(8, "little"))
        hasher.update(values.tobytes())
    return int.from_bytes(hasher.digest(), "little")


def identity(parts: Parts, **numbers: float) -> int:
    """Hash of all that an example teaches: tokens, which of them have loss, ranks if some are tied,
    and the numbers of its row."""
    flat = [(parts.prompt, parts.prompt_learned), *parts.answers]
    arrays = [values for part in flat for values in part]
    untied = range(len(parts.answers))
    if parts.ranks and [*parts.ranks] != [*untied]:
        arrays.append(np.array(parts.ranks, np.int64))
    if given := [(OF_ROWS.index(n), v) for n, v in numbers.items() if not math.isnan(v)]:
        arrays.append(np.array(given))
    return digest(*arrays)


def check_embedded(tokens: Any, vocab_size: int, fix: str = "") -> None:
    """Check that the model has an embedding of every token.

    Raises:
        TokenizerError: a token has none.
    """
    tokens = np.asarray(tokens)
    for extreme in (int(tokens.max(initial=0)), int(tokens.min(initial=0))):
        if not 0 <= extreme < vocab_size:
            raise TokenizerError(
                f"tokenizer: gives id {extreme} and the embedding has {vocab_size} rows; use the "
                f"model's own tokenizer{fix}"
            )
