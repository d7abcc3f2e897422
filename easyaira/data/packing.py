"""Packing of examples into rows, and the shapes of rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from easyaira.data.examples import Examples


class Shape(NamedTuple):
    """Rows of a data shard, and their length."""

    rows: int
    length: int


MAX_SHAPES = 8
COMPILATION = 10  # what a program more costs, in updates
ROW_COUNTS = 24  # that are tried for a length


def bucket(size: int, multiple: int = 1) -> int:
    """`size` rounded up so that only four sizes in each doubling occur."""
    step = max(multiple, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The indices of `lengths` in as few rows of `room` as best-fit finds, longest first."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[i]
        place = bisect_left(spaces, (length, -1))
        if place == len(spaces):
            rows.append([i])
            insort(spaces, (room - length, len(rows) - 1))
        else:
            space, row = spaces.pop(place)
            rows[row].append(i)
            insort(spaces, (space - length, row))
    return rows


def choose_shapes(lengths: list[int], needed: np.ndarray, cost, *, updates: int) -> list[Shape]:
    """Few shapes that hold all updates at little cost.

    Args:
        lengths: row lengths to choose from.
        needed: [lengths, sampled updates] rows that an update needs at a length; infinite where a
            row is too short for it.
        cost: of a shape.
        updates: how often they will be used, all together.
    """
    candidates, fits = [], []
    for length, row in zip(lengths, needed, strict=True):
        counts = np.unique(row[np.isfinite(row)])
        some = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), ROW_COUNTS)).astype(int))
        for rows in counts[some] if len(counts) else []:
            candidates.append(Shape(int(rows), length))
            fits.append(row <= rows)
    costs = np.where(np.array(fits), np.array([[cost(shape)] for shape in candidates]), np.inf)
    chosen = [int(np.argmin(costs.sum(1)))]
    enough = COMPILATION / max(updates, 1)  # of the mean cost of an update
    while len(chosen) < MAX_SHAPES:
        best = costs[chosen].min(0)
        totals = np.minimum(costs, best).sum(1)
        least = int(np.argmin(totals))
        if totals[least] > (1 - enough) * best.sum():
            break
        chosen.append(least)
        for i in range(len(chosen)):  # what was chosen first may be chosen better now
            others = costs[chosen[:i] + chosen[i + 1 :]].min(0)
            chosen[i] = int(np.argmin(np.minimum(costs, others).sum(1)))
    return [candidates[i] for i in dict.fromkeys(chosen)]


WORTH_SHARING = 0.15  # of the positions; below it, the longer rows cost more than is saved


def shares_prompt(choice: str, examples: Examples) -> bool:
    """Whether pairs are stored with their prompt once."""
    if examples.answers != 2 or choice == "never":
        return False
    prompts = int((examples.bounds[:, 1] - examples.bounds[:, 0]).sum())
    return choice == "always" or prompts > WORTH_SHARING * int(examples.lengths().sum())


def attention_cost(width: int, heads: int) -> float:
    """What a position's attention costs for each position it may look at, as a share of the
    products with weights: 4 D against 24 D^2 operations a layer, and about 30 for a score."""
    return (4 * width + 30 * heads) / (24 * width**2)
