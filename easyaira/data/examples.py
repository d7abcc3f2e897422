"""Examples on disk: tokens one after another in flat files, and what is known of each example.

An example is a prompt with one answer (SFT), with two (DPO: chosen, rejected), or texts to be
judged. Tokens are mapped into memory and not read, so that a million examples cost no memory but
their bounds.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from easyaira.errors import DataError


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
        found = hashlib.sha256()
        for values in (self.ids, self.bounds[:, -1] - self.bounds[:, 0], self.unseen):
            found.update(np.ascontiguousarray(values).tobytes())
        return found.hexdigest()[:16]


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
        known["ids"] = digest(*(values for part in flat for values in part))
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


def digest(*arrays: np.ndarray) -> int:
    """A hash of arrays and where each of them ends, 64 bits."""
    found = hashlib.blake2b(digest_size=8)
    for values in arrays:
        found.update(len(values).to_bytes(8, "little"))
        found.update(values.tobytes())
    return int.from_bytes(found.digest(), "little")
