"""Examples to batches of rows: one layout for SFT and preference pairs, packed or not.

A batch is a dictionary of arrays. A axis: micro-batches of an update; R: rows; T: tokens; B:
examples of a micro-batch.

    tokens       [A, R, T]  token ids; 0 in padding
    positions    [A, R, T]  place in its own sequence, from 0
    segment_ids  [A, R, T]  the example's number in its micro-batch, from 1; 0 is padding
    sides        [A, R, T]  0 shared or unpaired, 1 chosen, 2 rejected
    loss_mask    [A, R, T]  tokens that are learned (each is predicted by the token before it)

and whatever is known of each example, [A, B, ...], such as the reference's log-probabilities.

Update n is a pure function of (seed, n): the order is one integer of state.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from easyaira.data.examples import Examples

LAYOUT = ("tokens", "positions", "segment_ids", "sides", "loss_mask")


class Batch(NamedTuple):
    """What one update is computed from.

    Attributes:
        arrays: see above.
        examples: [n] which examples these are.
        slots: [n, 2] the micro-batch and the place in it of each example.
        num_tokens: real tokens; a prompt counts once with each answer, padding never.
    """

    arrays: dict[str, np.ndarray]
    examples: np.ndarray
    slots: np.ndarray
    num_tokens: int


class Shape(NamedTuple):
    """Rows of a data shard, and their length. A program is compiled for each shape that occurs."""

    rows: int
    length: int

    @property
    def cost(self) -> float:
        """What it costs to compute: its positions, more in long rows, whose attention grows."""
        return self.rows * self.length * (1 + self.length / 2048)


MAX_SHAPES = 4
WORTH_A_SHAPE = 0.05  # of the cost of all updates; one more program takes time to compile
SAMPLED_UPDATES = 64
MAX_PACKED_LENGTH = 4096  # longer rows only for longer examples


def bucket(size: int, multiple: int = 1) -> int:
    """`size` rounded up so that only four sizes in each doubling occur."""
    step = max(multiple, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The indices of `lengths` in as few rows of `room` as best-fit finds, longest first."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, (lengths[i], -1))
        if place == len(spaces):
            rows.append([])
            space, row = room, len(rows) - 1
        else:
            space, row = spaces.pop(place)
        rows[row].append(i)
        insort(spaces, (space - lengths[i], row))
    return rows


class Block(NamedTuple):
    """Tokens that see each other: a prompt with one answer."""

    member: int  # the example's number in its group
    side: int  # 0, or 1 and 2 of a pair
    prompt: slice  # of the flat arrays of the examples
    answer: slice

    @property
    def length(self) -> int:
        return self.prompt.stop - self.prompt.start + self.answer.stop - self.answer.start


@dataclass(frozen=True)
class Batches:
    """The updates of a run, by number.

    Attributes:
        examples: what is trained on.
        size: examples in an update.
        accumulation: micro-batches in an update.
        shards: parts that a micro-batch is divided into, each with the same number of rows.
        packing: several examples in a row.
        seed: of the order, a new permutation in every epoch; None keeps the order of the examples.
        drop_last: leave out an epoch's last, smaller update.
        known: name -> [n, ...] what is known of each example.
    """

    examples: Examples
    size: int
    accumulation: int = 1
    shards: int = 1
    packing: bool = True
    seed: int | None = None
    drop_last: bool = False
    known: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        """Updates in an epoch."""
        whole, rest = divmod(len(self.examples), self.size)
        return whole + bool(rest and not self.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.examples))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))

    def members(self, update: int) -> np.ndarray:
        """The examples of an update, counted from 0 over all epochs."""
        epoch, place = divmod(update, len(self))
        return self.order(epoch)[place * self.size : (place + 1) * self.size]

    def groups(self, update: int) -> list[list[Block]]:
        """The blocks of each shard of each micro-batch; every group has as many examples."""
        parts = np.array_split(self.members(update), self.accumulation * self.shards)
        return [self._blocks(part) for part in parts]

    def _blocks(self, members: np.ndarray) -> list[Block]:
        blocks = []
        for member, bounds in enumerate(self.examples.bounds[members].tolist()):
            prompt = slice(bounds[0], bounds[1])
            answers = list(itertools.starmap(slice, itertools.pairwise(bounds[1:])))
            sides = (1, 2) if len(answers) == 2 else (0,)
            blocks += [Block(member, s, prompt, a) for s, a in zip(sides, answers, strict=True)]
        return blocks

    def rows_of(self, groups: list[list[Block]], length: int) -> list[list[list[int]]]:
        """For each group, which blocks share a row."""
        if not self.packing:
            return [[[i] for i in range(len(group))] for group in groups]
        return [pack([block.length for block in group], length) for group in groups]

    @cached_property
    def shapes(self) -> list[Shape]:
        """The shapes of this run, chosen from a sample of its updates.

        The one that serves all of them best, and then, one by one, whichever saves most, as long as
        it saves enough to be worth a program.
        """
        sample = [self.groups(i) for i in range(min(len(self), SAMPLED_UPDATES))]
        longest = [max(block.length for group in groups for block in group) for groups in sample]
        totals = [max(sum(b.length for b in group) for group in groups) for groups in sample]
        limit = max(max(longest), MAX_PACKED_LENGTH if self.packing else 0)
        lengths = {bucket(n, 8) for n in (*longest, *totals) if n <= limit}
        needed = np.full((len(lengths), len(sample)), np.inf)  # rows, where the length is enough
        for i, length in enumerate(sorted(lengths)):
            for j, groups in enumerate(sample):
                if length >= longest[j]:
                    needed[i, j] = max(map(len, self.rows_of(groups, length)))
        return choose_shapes(sorted(lengths), needed)

    def arrange(self, groups: list[list[Block]]) -> tuple[Shape, list[list[list[int]]]]:
        """The cheapest shape that holds an update, and how it does. An update that is unlike all
        that were sampled has a shape of its own."""
        longest = max(block.length for group in groups for block in group)
        for shape in sorted(self.shapes, key=lambda shape: shape.cost):
            if shape.length >= longest:
                rows = self.rows_of(groups, shape.length)
                if max(map(len, rows)) <= shape.rows:
                    return shape, rows
        length = bucket(longest, 8)
        rows = self.rows_of(groups, length)
        return Shape(bucket(max(map(len, rows))), length), rows

    def __getitem__(self, update: int) -> Batch:
        members, groups = self.members(update), self.groups(update)
        shape, rows = self.arrange(groups)
        layout = (self.accumulation, self.shards, *shape)
        arrays = {name: np.zeros(layout, np.int32) for name in LAYOUT}
        per_group = self.size // len(groups)
        slots = []
        for g, (group, group_rows) in enumerate(zip(groups, rows, strict=True)):
            micro, shard = divmod(g, self.shards)
            first = shard * per_group
            slots += [(micro, first + m) for m in dict.fromkeys(block.member for block in group)]
            for r, row in enumerate(group_rows):
                start = 0
                for block in (group[i] for i in row):
                    place = (micro, shard, r, slice(start, start + block.length))
                    for name, flat in (
                        ("tokens", self.examples.tokens),
                        ("loss_mask", self.examples.learned),
                    ):
                        arrays[name][place] = np.concatenate(
                            [flat[block.prompt], flat[block.answer]]
                        )
                    arrays["positions"][place] = np.arange(block.length)
                    arrays["segment_ids"][place] = first + block.member + 1
                    arrays["sides"][place] = block.side
                    start += block.length
        rows_and_length = (self.accumulation, self.shards * shape.rows, shape.length)
        arrays = {name: array.reshape(rows_and_length) for name, array in arrays.items()}
        arrays["loss_mask"] = arrays["loss_mask"].astype(bool)
        for name, values in self.known.items():
            held = np.zeros(
                (self.accumulation, self.size // self.accumulation, *values.shape[1:]), values.dtype
            )
            held[tuple(np.array(slots).T)] = values[members]
            arrays[name] = held
        num_tokens = sum(block.length for group in groups for block in group)
        return Batch(arrays, members, np.array(slots), num_tokens)


def choose_shapes(lengths: list[int], needed: np.ndarray) -> list[Shape]:
    """Few shapes that hold all updates at little cost.

    Args:
        lengths: row lengths to choose from.
        needed: [lengths, updates] rows that an update needs at a length; infinite where a row is
            too short for it.
    """
    candidates = [
        Shape(int(rows), length)
        for length, row in zip(lengths, needed, strict=True)
        for rows in {bucket(int(n)) for n in row[np.isfinite(row)]}
    ]
    place = {length: i for i, length in enumerate(lengths)}
    costs = np.array(  # [candidates, updates], infinite where it does not hold the update
        [np.where(needed[place[s.length]] <= s.rows, s.cost, np.inf) for s in candidates]
    )
    chosen = [int(np.argmin(costs.sum(1)))]
    best = costs[chosen[0]]
    while len(chosen) < MAX_SHAPES:
        totals = np.minimum(costs, best).sum(1)
        least = int(np.argmin(totals))
        if totals[least] > (1 - WORTH_A_SHAPE) * best.sum():
            break
        chosen.append(least)
        best = np.minimum(costs[least], best)
    return [candidates[i] for i in chosen]
