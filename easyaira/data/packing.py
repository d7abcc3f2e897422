"""Packing of examples into rows, and the choice of row shapes."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from easyaira.data.examples import Examples


class Shape(NamedTuple):
    """Rows per data shard, and their length."""

    rows: int
    length: int


MAX_SHAPES = 8
COMPILATION = 10  # cost of compiling one more program, in updates, at most
CPU_COMPILATION = 1.6e12  # cost on a CPU, in operations: 8 seconds at 200 GFLOP/s
ROW_COUNTS = 24  # row counts to try per length


def bucket(size: int, multiple: int = 1, per_doubling: int = 4) -> int:
    """Round `size` up to one of `per_doubling` (a power of 2) sizes per doubling, and to a multiple
    of `multiple`."""
    step = max(multiple, (1 << size.bit_length()) // (2 * per_doubling))
    return -(-size // step) * step


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack `lengths` above 0 into rows of `room` by best-fit decreasing; return the indices in each
    row."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    longer = filter(lengths.__getitem__, range(len(lengths)))
    for i in sorted(longer, key=lengths.__getitem__, reverse=True):
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


def choose_shapes(
    lengths: list[int],
    needed: np.ndarray,
    cost: Callable[[Shape], float],
    *,
    updates: int,
    compilation: float = COMPILATION,
    weights: np.ndarray | float = 1.0,
) -> list[Shape]:
    """Choose a few shapes that fit all updates at low cost.

    Args:
        lengths: row lengths to choose from.
        needed: [lengths, sampled updates] rows that an update needs at a length; infinite where the
            length is too short.
        cost: function from a shape to its cost.
        updates: number of updates that will use the shapes.
        compilation: cost of compiling one more program, in updates.
        weights: [sampled updates] how many updates each stands for.
    """
    candidates, fits = [], []
    for length, row in zip(lengths, needed, strict=True):
        counts = np.unique(row[np.isfinite(row)])
        sampled = np.unique(
            np.linspace(0, len(counts) - 1, min(len(counts), ROW_COUNTS)).astype(int)
        )
        for rows in counts[sampled] if len(counts) else []:
            candidates.append(Shape(int(rows), length))
            fits.append(row <= rows)
    costs = np.array([[cost(shape)] for shape in candidates]) * weights
    costs = np.where(np.array(fits), costs, np.inf)
    chosen = [int(np.argmin(costs.sum(1)))]
    enough = compilation / max(updates, 1)  # as a share of an update's mean cost
    while len(chosen) < MAX_SHAPES:
        best = costs[chosen].min(0)
        totals = np.minimum(costs, best).sum(1)
        least = int(np.argmin(totals))
        if totals[least] > (1 - enough) * best.sum():
            break
        chosen.append(least)
        for i in range(len(chosen)):  # earlier choices may improve now
            others = costs[chosen[:i] + chosen[i + 1 :]].min(0)
            chosen[i] = int(np.argmin(np.minimum(costs, others).sum(1)))
    return [candidates[i] for i in dict.fromkeys(chosen)]


# Share of tokens saved, below which longer rows, or masked tiles, cost more than sharing saves
WORTH_SHARING, WORTH_SHARING_TILES = 0.15, 0.03


def shares_prompt(choice: str, examples: Examples, kernel: str) -> bool:
    """Whether to store a prompt once for all its answers.

    Args:
        kernel: attention implementation, see models/attention.py.
    """
    if examples.answers < 2 or choice == "never":
        return False
    prompts = examples.bounds[:, 1] - examples.bounds[:, 0]
    saved = int((prompts * (examples.exists.sum(1) - 1)).sum())
    worth = WORTH_SHARING_TILES if kernel == "tiles" else WORTH_SHARING
    return choice == "always" or saved > worth * int(examples.lengths().sum())


def attention_cost(width: int, heads: int, kernel: str) -> float:
    """Attention cost of a position per position of its row, relative to the products with weights:
    4 D against 24 D^2 operations per layer, and about 30 operations per score. Zero for tiles,
    which depend on the length of the text alone."""
    return 0.0 if kernel == "tiles" else (4 * width + 30 * heads) / (24 * width**2)


def compilation_cost(parameters: int, platform: str) -> float:
    """Positions whose computing takes as long as compiling one more program. An update takes six
    operations a parameter and position: Kaplan et al. (2020), table 1."""
    return CPU_COMPILATION / (6 * parameters) if platform == "cpu" else math.inf
