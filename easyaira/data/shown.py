"""Rows that the data report shows, token by token."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np

from easyaira.data.examples import Account, Parts
from easyaira.data.template import Template

ROWS = 12  # size of the sample of rows that are trained on
FIRST = 2  # rows of every other outcome, in addition to the sample
LONGEST = 2000  # tokens shown of a span
KEPT = "trained on"
STATES = {True: "trained", False: "masked"}


def show(account: Account, place: str, parts: Parts, template: Template, outcome: str) -> None:
    """Record a row for a report, which holds a random sample of the kept rows, changed or not, and
    the first two rows of every outcome except KEPT. The sample holds the rows whose places have the
    smallest hashes."""
    seen: Counter[str] = Counter()
    sample = []
    for row in account.shown:
        seen[row[1]] += 1
        if row[1].startswith(KEPT) and (row[1] == KEPT or seen[row[1]] > FIRST):
            sample.append(row)
    if outcome == KEPT or seen[outcome] >= FIRST:
        if not outcome.startswith(KEPT):
            return
        if len(sample) >= ROWS:
            last = max(sample, key=lambda row: _hash(row[0]))
            if _hash(place) >= _hash(last[0]):
                return
            account.shown.remove(last)
    cut = parts.cut or (np.zeros(0, np.int32),) * (1 + len(parts.answers))
    before = [_abridged(cut[0], None), _abridged(parts.prompt, parts.prompt_learned)]
    shown: list[list[Any]] = []
    for side, (tokens, learned) in enumerate(parts.answers):
        tail = cut[1 + side]
        spans = [*before, _abridged(tokens, learned), _abridged(tail, None)]
        ids = np.concatenate([tokens for tokens, *_ in spans]).tolist()
        texts = template.pieces(ids)
        notes = [note for *_, notes in spans for note in notes]
        texts = [note + text for note, text in zip(notes, texts, strict=True)]
        states = [state for _, states, _ in spans for state in states]
        pieces = [list(piece) for piece in zip(texts, states, ids, strict=True)]
        known = sum(len(tokens) for tokens, *_ in before)
        shown += pieces[: 0 if side else known]
        if len(parts.answers) == 2:
            shown.append([("chosen", "rejected")[side], "side", None])
        elif len(parts.answers) > 2:
            rank = parts.ranks[side] if parts.ranks else side
            shown.append([f"rank {rank + 1}", "side", None])
        shown += pieces[known:]
    if not outcome.startswith(KEPT):
        shown = [[text, state if state == "side" else "cut", i] for text, state, i in shown]
    account.shown.append([place, outcome, shown])


def _hash(place: str) -> bytes:
    """Hash of the file's name and the row, so that a sample does not depend on the folder."""
    name = place.rpartition("/")[2].encode("utf-8", "replace")
    return hashlib.blake2b(name, digest_size=8).digest()


def _abridged(
    tokens: np.ndarray, learned: np.ndarray | None
) -> tuple[np.ndarray, list[str], list[str]]:
    """Tokens for a report, without the middle of a long span; the state of each, and text to write
    before it. Without `learned`, the state is "cut"."""
    index, middle = np.arange(len(tokens)), LONGEST // 2
    if left_out := max(len(tokens) - LONGEST, 0):
        index = np.delete(index, slice(middle, middle + left_out))
    notes = [""] * len(index)
    if left_out:
        notes[middle] = f" ... {left_out:,} tokens ... "
    states = ["cut" if learned is None else STATES[bool(learned[i])] for i in index]
    return tokens[index], states, notes
