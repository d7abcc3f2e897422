"""Examples to batches of rows: one layout for SFT and preference pairs, packed or not.

A batch is a dictionary of arrays. A axis: micro-batches of an update; R: rows; T: tokens; B:
examples of a micro-batch.

    tokens       [A, R, T]  token ids; 0 in padding
    positions    [A, R, T]  place in its own sequence, from 0
    segment_ids  [A, R, T]  the example's number in its micro-batch, from 1; 0 is padding
    sides        [A, R, T]  0 shared or unpaired, 1 chosen, 2 rejected, 3 seen by no token
    loss_mask    [A, R, T]  tokens that are learned (each is predicted by the token before it)

and whatever is known of each example, [A, B, ...], such as the reference's log-probabilities.

A pair lies in two sequences, or, with its prompt stored once, in one: the prompt but for its last
token, then for each side that last token and the answer. So every learned token has the one that
predicts it before it, and only one token of the prompt is there twice.

Update n is a pure function of (seed, n): the order is one integer of state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from easyaira.data.examples import Examples
from easyaira.data.packing import Shape, bucket, choose_shapes, pack

LAYOUT = ("tokens", "positions", "segment_ids", "sides", "loss_mask")
UNSEEN = 3  # the side of tokens that no token looks at


class Batch(NamedTuple):
    """What one update is computed from.

    Attributes:
        arrays: see above.
        examples: [n] which examples these are.
        slots: [n, 2] the micro-batch and the place in it of each example.
        num_tokens: real tokens; a prompt counts once with each answer, padding never.
        positions: how many are computed, padding too; `filled`: how many of them hold a token.
        shape: rows of a shard and their length; a program is compiled for each that occurs.
    """

    arrays: dict[str, np.ndarray]
    examples: np.ndarray
    slots: np.ndarray
    num_tokens: int
    positions: int
    filled: int
    shape: Shape


SAMPLED_UPDATES = 256
EXTREME_UPDATES = 16  # the largest and those with the longest examples, of SAMPLED_EPOCHS
SAMPLED_EPOCHS = 3
MAX_PACKED_LENGTH = 4096  # longer rows only for longer examples


@lru_cache(maxsize=4)
def _order(seed: int | None, epoch: int, count: int) -> np.ndarray:
    if seed is None:
        return np.arange(count)
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Batches:
    """The updates of a run, by number.

    Attributes:
        examples: what is trained on.
        size: examples in an update.
        accumulation: micro-batches in an update.
        shards: parts that a micro-batch is divided into, each with as many rows and examples.
        local: the shards whose rows this host makes; default: all.
        packing: several examples in a row.
        share_prompt: pairs lie in one sequence, with their prompt stored once.
        seed: of the order, a new permutation in every epoch; None keeps the order of the examples.
        drop_last: leave out an epoch's last, smaller update.
        attention: cost of a position's attention, for each position of its row, as a share of all
            else that a position costs.
        multiple: of which every row length is one, as a device's attention wants it.
        known: name -> [n, ...] what is known of each example.
    """

    examples: Examples
    size: int
    accumulation: int = 1
    shards: int = 1
    local: Sequence[int] | None = None
    packing: bool = True
    share_prompt: bool = False
    seed: int | None = None
    drop_last: bool = False
    attention: float = 1 / 2048
    multiple: int = 8
    known: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        """Updates in an epoch."""
        whole, rest = divmod(len(self.examples), self.size)
        return whole + bool(rest and not self.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        return _order(self.seed, epoch, len(self.examples))

    def members(self, update: int) -> np.ndarray:
        """The examples of an update, counted from 0 over all epochs."""
        epoch, place = divmod(update, len(self))
        return self.order(epoch)[place * self.size : (place + 1) * self.size]

    @cached_property
    def block_lengths(self) -> np.ndarray:
        """[n, 1 or 2] the tokens of an example that must lie together in a row."""
        bounds = self.examples.bounds
        if not self.share_prompt:
            return self.examples.lengths()
        prompt = bounds[:, 1] - bounds[:, 0]
        last = np.minimum(prompt, 1)  # a prompt's last token stands before each answer
        return (prompt - last + 2 * last + bounds[:, 3] - bounds[:, 1])[:, None]

    def groups(self, update: int) -> list[list[int]]:
        """The block lengths of each shard of each micro-batch, example by example."""
        parts = np.array_split(self.members(update), self.accumulation * self.shards)
        return [self.block_lengths[part].ravel().tolist() for part in parts]

    def rows_of(self, groups: list[list[int]], length: int) -> list[list[list[int]]]:
        """For each group, which blocks share a row."""
        if not self.packing:
            return [[[i] for i in range(len(group))] for group in groups]
        return [pack(group, length) for group in groups]

    def _sampled(self) -> list[int]:
        """Updates that stand for all: some of an epoch, and the largest of several."""
        chosen = set(np.linspace(0, len(self) - 1, min(len(self), SAMPLED_UPDATES)).astype(int))
        per_example = self.block_lengths.sum(1), self.block_lengths.max(1)
        for epoch in range(SAMPLED_EPOCHS if self.seed is not None else 1):
            starts = np.arange(len(self)) * self.size
            order = self.order(epoch)[: (starts[-1] + self.size)]
            sums = np.add.reduceat(per_example[0][order], starts)
            longest = np.maximum.reduceat(per_example[1][order], starts)
            for sizes in (sums, longest):
                extreme = np.argsort(sizes, kind="stable")[-EXTREME_UPDATES:]
                chosen |= set(extreme + epoch * len(self))
        return sorted(int(update) for update in chosen)

    @cached_property
    def shapes(self) -> list[Shape]:
        """The shapes of this run, the cheapest first, chosen from a sample of its updates: the one
        that serves all best, and others as long as each saves more than its compilation costs. They
        do not depend on drop_last, so that going through all the data meets the same programs."""
        if self.drop_last:
            return replace(self, drop_last=False).shapes
        sample = [self.groups(update) for update in self._sampled()]
        longest = np.array([max(max(group, default=1) for group in groups) for groups in sample])
        totals = np.array([max(sum(group) for group in groups) for groups in sample])
        limit = max(int(longest.max()), MAX_PACKED_LENGTH if self.packing else 0)
        sizes = {int(n) for n in (*longest, *totals) if n <= limit}
        sizes |= {size for size in (2**i + 2**j for i in range(3, 12) for j in (i - 1, i))}
        useful = {n for n in sizes if longest.min() <= n <= min(limit, totals.max())}
        lengths = sorted({bucket(n, self.multiple) for n in useful | {int(longest.max())}})
        needed = np.full((len(lengths), len(sample)), np.inf)  # rows, where the length is enough
        for i, length in enumerate(lengths):
            for j, groups in enumerate(sample):
                if length >= longest[j]:
                    needed[i, j] = max(map(len, self.rows_of(groups, length)))
        shapes = choose_shapes(lengths, needed, self.cost, updates=len(self))
        return sorted(shapes, key=self.cost)

    def of_each_shape(self) -> list[int]:
        """The first update, and one more for each other shape."""
        first: dict[Shape, int] = {}
        for update in (0, *self._sampled()):
            first.setdefault(self.arrange(self.groups(update))[0], update)
        return list(first.values())

    def largest(self) -> int:
        """Of the updates that stand for all, the one whose shape costs most."""
        shapes = {update: self.arrange(self.groups(update))[0] for update in self._sampled()}
        return max(shapes, key=lambda update: self.cost(shapes[update]))

    def cost(self, shape: Shape) -> float:
        return shape.rows * shape.length * (1 + self.attention * shape.length)

    def arrange(self, groups: list[list[int]]) -> tuple[Shape, list[list[list[int]]]]:
        """The cheapest shape that holds an update, and how it does. An update that is unlike all
        that were sampled has a shape of its own."""
        longest = max(max(group, default=1) for group in groups)
        total = max(sum(group) for group in groups)
        packed: dict[int, list[list[list[int]]]] = {}
        for shape in self.shapes:
            if shape.length >= longest and shape.rows * shape.length >= total:
                if shape.length not in packed:
                    packed[shape.length] = self.rows_of(groups, shape.length)
                rows = packed[shape.length]
                if max(map(len, rows)) <= shape.rows:
                    return shape, rows
        length = bucket(max(longest, self.shapes[-1].length), self.multiple)
        rows = self.rows_of(groups, length)
        return Shape(bucket(max(map(len, rows))), length), rows

    def __getitem__(self, update: int) -> Batch:
        members, groups = self.members(update), self.groups(update)
        shape, rows = self.arrange(groups)
        local = range(self.shards) if self.local is None else self.local
        layout = (self.accumulation, len(local), *shape)
        arrays = {name: np.zeros(layout, np.int32) for name in LAYOUT}
        arrays["loss_mask"] = arrays["loss_mask"].astype(bool)
        flat = [array.reshape(-1) for array in arrays.values()]
        per_group = self.size // len(groups)
        of_group = np.array_split(members, len(groups))
        slots = np.zeros((len(members), 2), np.int64)
        done = 0
        for g, group in enumerate(groups):
            micro, shard = divmod(g, self.shards)
            first = shard * per_group  # the examples of a micro-batch are numbered over its shards
            count = len(of_group[g])
            slots[done : done + count, 0] = micro
            slots[done : done + count, 1] = first + np.arange(count)
            done += count
            if shard not in local:
                continue
            bounds = self.examples.bounds[of_group[g]].tolist()
            unseen = self.examples.unseen[of_group[g]].tolist()
            blocks = len(group) // max(count, 1)  # of an example
            corner = (micro * len(local) + local.index(shard)) * shape.rows
            for r, row in enumerate(rows[g]):
                at = (corner + r) * shape.length
                for i in row:
                    member, block = divmod(i, blocks)
                    self._write(flat, at, bounds[member], block, first + member + 1)
                    if unseen[member]:
                        end = at + group[i]
                        flat[3][end - unseen[member] : end] = UNSEEN
                    at += group[i]
        lines = (self.accumulation, len(local) * shape.rows, shape.length)
        arrays = {name: array.reshape(lines) for name, array in arrays.items()}
        for name, values in self.known.items():
            held = np.zeros(
                (self.accumulation, self.size // self.accumulation, *values.shape[1:]), values.dtype
            )
            held[tuple(slots.T)] = values[members]
            arrays[name] = held
        unseen = int(self.examples.unseen[members].sum())
        return Batch(
            arrays,
            members,
            slots,
            num_tokens=int(self._lengths[members].sum()) - unseen,
            positions=self.accumulation * self.shards * shape.rows * shape.length,
            filled=sum(map(sum, groups)) - unseen,
            shape=shape,
        )

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self.examples.lengths().sum(1)

    def _write(
        self, flat: list[np.ndarray], at: int, bounds: list[int], block: int, number: int
    ) -> None:
        """One block at one place: whole slices, since a million of them are written."""
        tokens, positions, segment_ids, sides, loss_mask = flat
        of, learned = self.examples.tokens, self.examples.learned
        start, answer = bounds[0], bounds[1]
        prompt = answer - start

        def copy(to: int, begin: int, end: int) -> int:
            tokens[to : to + end - begin] = of[begin:end]
            loss_mask[to : to + end - begin] = learned[begin:end]
            return to + end - begin

        if self.share_prompt:
            last = min(prompt, 1)
            middle = copy(at, start, bounds[2])
            end = copy(copy(middle, answer - last, answer), bounds[2], bounds[3])
            positions[at:middle] = _places(middle - at)
            positions[middle:end] = _places(prompt + bounds[3] - bounds[2])[prompt - last :]
            sides[at + prompt - last : middle] = 1
            sides[middle:end] = 2
        else:
            end = at
            if block:  # the second answer does not lie behind the prompt
                end = copy(end, start, answer)
                start = bounds[1 + block]
            end = copy(end, start, bounds[2 + block])
            positions[at:end] = _places(end - at)
            if len(bounds) == 4:
                sides[at:end] = 1 + block
        segment_ids[at:end] = number


_PLACES = np.arange(1 << 16, dtype=np.int32)


def _places(count: int) -> np.ndarray:
    return _PLACES[:count] if count <= len(_PLACES) else np.arange(count, dtype=np.int32)
