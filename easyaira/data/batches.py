"""Examples to batches of rows: one layout for one answer to a prompt, two or more, packed or not.

A batch is a dictionary of arrays. Axes: A micro-batches of an update, R rows, T tokens, B examples
of a micro-batch.

    tokens       [A, R, T]  token ids; 0 in padding
    positions    [A, R, T]  position in the token's own sequence, from 0
    segment_ids  [A, R, T]  index of the example in its micro-batch, from 1; 0 is padding
    sides        [A, R, T]  0: shared prompt, or the only answer; k + 1: answer k (in a pair, 1 is
                            chosen, 2 rejected); UNATTENDED: masked for every token
    loss_mask    [A, R, T]  tokens with loss (each is predicted by the token before it)

A batch also has per-example arrays [A, B, ...], such as the reference's log-probabilities.

Several answers are stored as separate sequences, or as one with a shared prompt. A shared sequence
is the prompt without its last token, then, for each answer, that token and the answer. So every
token with loss follows the token that predicts it, only one token of the prompt is repeated, and
positions continue from the prompt's end in every answer.

Update n is a pure function of (seed, n), so the only state of the data order is one integer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from easyaira.data.examples import Examples
from easyaira.data.packing import COMPILATION, Shape, bucket, choose_shapes, pack
from easyaira.models.layout import UNATTENDED

LAYOUT = ("tokens", "positions", "segment_ids", "sides", "loss_mask")


class Batch(NamedTuple):
    """The data of one update.

    Attributes:
        arrays: see above.
        examples: [n] indices of the examples.
        slots: [n, 2] micro-batch of each example, and its index there.
        num_tokens: tokens without padding; a shared prompt counts once per answer.
        positions: computed positions, including padding.
        filled: computed positions without padding.
        shape: rows per shard and their length; each distinct shape compiles one program.
    """

    arrays: dict[str, np.ndarray]
    examples: np.ndarray
    slots: np.ndarray
    num_tokens: int
    positions: int
    filled: int
    shape: Shape


SAMPLED_UPDATES = 256
EXTREME_UPDATES = 16  # of each sampled epoch: the largest, and as many with the longest examples
SAMPLED_EPOCHS = 3
MAX_PACKED_LENGTH = 4096  # longer only where an example is longer


@lru_cache(maxsize=4)
def _order(seed: int | None, epoch: int, count: int, together: int) -> np.ndarray:
    if seed is None:
        return np.arange(count)
    order = np.random.default_rng([seed, epoch]).permutation(count // together)
    return (order[:, None] * together + np.arange(together)).ravel()


@dataclass(frozen=True)
class Batches:
    """The batches of a run, indexed by update.

    Attributes:
        examples: the examples to train on.
        size: examples per update.
        accumulation: micro-batches per update.
        shards: data shards of a micro-batch, with equal numbers of rows and of examples.
        local: shards that this host builds; default: all.
        packing: put several examples into one row.
        share_prompt: store several answers as one sequence, with their prompt once.
        seed: seed of a new permutation in every epoch; None keeps the order of the examples.
        drop_last: drop an epoch's last update if it is smaller than the others.
        attention: attention cost of a position per position of its row, relative to all other cost
            of a position; 0: `one_row`.
        compilation: cost of compiling one more program, in positions of a shard; at most that of
            `packing.COMPILATION` updates.
        multiple: divisor of every row length, as the device's attention requires.
        known: name -> [n, ...] per-example arrays.
        length: length of the rows, unless an example is longer; None: chosen by cost. With
            `one_row`, it is ignored, and each update has its own.
        together: consecutive examples that stay together on a shard, in their order; divides the
            examples of a shard and the number of all.
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
    compilation: float = math.inf
    multiple: int = 8
    known: Mapping[str, np.ndarray] = field(default_factory=dict)
    length: int | None = None
    together: int = 1

    def __len__(self) -> int:
        """Updates in an epoch."""
        whole, rest = divmod(len(self.examples), self.size)
        return whole + bool(rest and not self.drop_last)

    @property
    def one_row(self) -> bool:
        """Whether all examples of a shard lie in one row: long rows cost no more attention."""
        return self.packing and not self.attention

    def order(self, epoch: int) -> np.ndarray:
        return _order(self.seed, epoch, len(self.examples), self.together)

    def members(self, update: int) -> np.ndarray:
        """Indices of an update's examples; updates count from 0 over all epochs."""
        epoch, place = divmod(update, len(self))
        return self.order(epoch)[place * self.size : (place + 1) * self.size]

    @cached_property
    def block_lengths(self) -> np.ndarray:
        """[n, 1 or answers] lengths of an example's blocks, each of which must fit into one row; 0
        where there is no answer."""
        bounds = self.examples.bounds
        if not self.share_prompt:
            return self.examples.lengths()
        prompt = bounds[:, 1] - bounds[:, 0]
        last = np.minimum(prompt, 1)  # the prompt's last token precedes each answer
        copies = self.examples.exists.sum(1)
        return (prompt + (copies - 1) * last + bounds[:, -1] - bounds[:, 1])[:, None]

    def groups(self, update: int) -> list[list[int]]:
        """Block lengths of each shard of each micro-batch, in the order of the examples."""
        parts = self.divided(self.members(update))
        return [self.block_lengths[part].ravel().tolist() for part in parts]

    def divided(self, members: np.ndarray) -> list[np.ndarray]:
        """The examples of each shard of each micro-batch."""
        units = members.reshape(-1, self.together)
        return [part.ravel() for part in np.array_split(units, self.accumulation * self.shards)]

    def rows_of(self, groups: list[list[int]], length: int) -> list[list[list[int]]]:
        """For each group, the indices of the blocks in each row."""
        if self.one_row:
            return [[list(filter(group.__getitem__, range(len(group))))] for group in groups]
        if not self.packing:
            return [[[i] for i, length in enumerate(group) if length] for group in groups]
        return [pack(group, length) for group in groups]

    def longest(self, groups: list[list[int]]) -> int:
        """Length of the longest piece that must fit into a row."""
        return max(sum(group) if self.one_row else max(group, default=1) for group in groups)

    def bucket(self, length: int) -> int:
        """A row length of at least `length`; finer steps for `one_row`, whose rest stays empty."""
        return bucket(length, self.multiple, 64 if self.one_row else 4)

    def _regular(self) -> set[int]:
        count = min(len(self), SAMPLED_UPDATES)
        return {int(update) for update in np.linspace(0, len(self) - 1, count)}

    def _sampled(self) -> list[int]:
        """A sample of updates: some of the first epoch, and the largest of several epochs."""
        chosen = self._regular()
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
        """The shapes of this run, cheapest first, chosen from a sample of its updates.

        The first choice is the best single shape. Others are added while each saves more than its
        compilation costs. Shapes do not depend on drop_last, so that a pass over all the data runs
        the same programs.
        """
        if self.length:
            return [] if self.one_row else [Shape(1, self.bucket(self.length))]
        if self.drop_last:
            return replace(self, drop_last=False).shapes
        sampled, regular = self._sampled(), self._regular()
        sample = [self.groups(update) for update in sampled]
        longest = np.array([self.longest(groups) for groups in sample])
        totals = np.array([max(sum(group) for group in groups) for groups in sample])
        limit = max(int(longest.max()), MAX_PACKED_LENGTH if self.packing else 0)
        sizes = {int(n) for n in (*longest, *totals) if n <= limit}
        sizes |= {size for size in (2**i + 2**j for i in range(3, 12) for j in (i - 1, i))}
        useful = {n for n in sizes if longest.min() <= n <= min(limit, totals.max())}
        lengths = sorted({self.bucket(n) for n in useful | {int(longest.max())}})
        needed = np.full((len(lengths), len(sample)), np.inf)  # rows per update; inf if too short
        for i, length in enumerate(lengths):
            for j, groups in enumerate(sample):
                if length >= longest[j]:
                    needed[i, j] = max(map(len, self.rows_of(groups, length)))
        # a regular update stands for many of all epochs, an extreme one for itself
        extreme = len(regular) / len(self) / SAMPLED_EPOCHS
        weights = np.array([1.0 if update in regular else extreme for update in sampled])
        shapes = choose_shapes(
            lengths,
            needed,
            self.cost,
            updates=len(self),
            compilation=min(COMPILATION, self.compilation / (self.accumulation * totals.mean())),
            weights=weights,
        )
        return sorted(shapes, key=self.cost)

    def of_each_shape(self) -> list[int]:
        """One sampled update of each shape, the first update among them."""
        first: dict[Shape, int] = {}
        for update in (0, *self._sampled()):
            first.setdefault(self.arrange(self.groups(update))[0], update)
        return list(first.values())

    def largest(self) -> int:
        """Index of the sampled update with the most expensive shape."""
        shapes = {update: self.arrange(self.groups(update))[0] for update in self._sampled()}
        return max(shapes, key=lambda update: self.cost(shapes[update]))

    def sampled_cost(self) -> float:
        """Cost of the sampled updates together."""
        return sum(self.cost(self.arrange(self.groups(u))[0]) for u in self._sampled())

    def cost(self, shape: Shape) -> float:
        return shape.rows * shape.length * (1 + self.attention * shape.length)

    def arrange(self, groups: list[list[int]]) -> tuple[Shape, list[list[list[int]]]]:
        """The cheapest shape that fits an update, and the blocks in each row of each group. If no
        shape of the run fits, a new one is made."""
        longest = self.longest(groups)
        total = max(sum(group) for group in groups)
        packed: dict[int, list[list[list[int]]]] = {}
        for shape in self.shapes:
            if shape.length >= longest and shape.rows * shape.length >= total:
                if shape.length not in packed:
                    packed[shape.length] = self.rows_of(groups, shape.length)
                rows = packed[shape.length]
                if max(map(len, rows)) <= shape.rows:
                    return shape, rows
        least = self.shapes[-1].length if self.shapes else 1
        length = bucket(max(longest, least), self.multiple)
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
        group_members = self.divided(members)
        slots = np.zeros((len(members), 2), np.int64)
        done = 0
        for g, group in enumerate(groups):
            micro, shard = divmod(g, self.shards)
            first = shard * per_group  # segment ids count over all shards of a micro-batch
            count = len(group_members[g])
            slots[done : done + count, 0] = micro
            slots[done : done + count, 1] = first + np.arange(count)
            done += count
            if shard not in local:
                continue
            bounds = self.examples.bounds[group_members[g]].tolist()
            unseen = self.examples.unseen[group_members[g]].tolist()
            existing = (self.examples.ranks[group_members[g]] >= 0).sum(1).tolist()
            blocks = len(group) // max(count, 1)  # per example
            corner = (micro * len(local) + local.index(shard)) * shape.rows
            for r, row in enumerate(rows[g]):
                at = (corner + r) * shape.length
                for i in row:
                    member, block = divmod(i, blocks)
                    count = existing[member]
                    self._write(flat, at, bounds[member], count, block, first + member + 1)
                    if unseen[member]:
                        end = at + group[i]
                        flat[3][end - unseen[member] : end] = UNATTENDED
                    at += group[i]
        row_layout = (self.accumulation, len(local) * shape.rows, shape.length)
        arrays = {name: array.reshape(row_layout) for name, array in arrays.items()}
        for name, values in self.known.items():
            by_slot = np.zeros(
                (self.accumulation, self.size // self.accumulation, *values.shape[1:]), values.dtype
            )
            by_slot[tuple(slots.T)] = values[members]
            arrays[name] = by_slot
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
        self,
        flat: list[np.ndarray],
        at: int,
        bounds: list[int],
        answers: int,
        block: int,
        number: int,
    ) -> None:
        """Write one block at position `at`, by slices, because a run writes millions of blocks."""
        tokens, positions, segment_ids, sides, loss_mask = flat
        source, learned = self.examples.tokens, self.examples.learned
        start, answer = bounds[0], bounds[1]
        prompt = answer - start

        def copy(to: int, begin: int, end: int) -> int:
            tokens[to : to + end - begin] = source[begin:end]
            loss_mask[to : to + end - begin] = learned[begin:end]
            return to + end - begin

        if self.share_prompt:
            last = min(prompt, 1)
            end = copy(at, start, answer - last)
            positions[at:end] = _places(end - at)
            for side, (own, stop) in enumerate(pairwise(bounds[1 : answers + 2]), 1):
                begin = end
                end = copy(copy(begin, answer - last, answer), own, stop)
                positions[begin:end] = _places(prompt + stop - own)[prompt - last :]
                sides[begin:end] = side
        else:
            end = at
            if block:  # further answers are not contiguous with the prompt
                end = copy(end, start, answer)
                start = bounds[1 + block]
            end = copy(end, start, bounds[2 + block])
            positions[at:end] = _places(end - at)
            if len(bounds) > 3:
                sides[at:end] = 1 + block
        segment_ids[at:end] = number


_PLACES = np.arange(1 << 16, dtype=np.int32)


def _places(count: int) -> np.ndarray:
    return _PLACES[:count] if count <= len(_PLACES) else np.arange(count, dtype=np.int32)
