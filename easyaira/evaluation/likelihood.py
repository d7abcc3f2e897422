"""Log-likelihoods of continuations. A context that several continuations share is computed once.

A sequence is a context without its last token, then for each continuation that token and the
continuation without its own last token, which predicts nothing. The context has side 0 and every
continuation a side of its own, as the answers that share a prompt (data/batches.py),
so each continuation attends to the context and to itself. Sequences are packed into rows of a few
shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from easyaira.data.packing import Shape, attention_cost, bucket, choose_shapes, pack
from easyaira.distributed import mesh as meshes
from easyaira.errors import WeightsError
from easyaira.losses.token_logps import token_logps
from easyaira.models.model import Model

TOKENS = 4096  # computed at a time, per data shard
ROOM = 512  # tokens of a context with its continuations, at most, or twice the context if more
FINE = 64  # row lengths per doubling: texts that are cut to the model's positions fill their rows


class Request(NamedTuple):
    """Token ids of a context and of what follows it, neither of them empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    logp: float  # sum over the continuation's tokens, in nats
    greedy: bool  # each token is the most likely one


class Sequenced(NamedTuple):
    """A sequence: the indices of the requests in it, and its length."""

    members: list[int]
    length: int


class Likelihoods:
    """Computes log-likelihoods with one model.

    Args:
        model, params, mesh: a language model on its devices.
        tokens: computed at a time, per data shard.
        share: compute a shared context once.
    """

    def __init__(
        self, model: Model, params: Any, mesh: Any, *, tokens: int = TOKENS, share: bool = True
    ):
        self.model, self.params, self.mesh = model, params, mesh
        self.tokens, self.share = tokens, share
        self._program = jax.jit(self._logps)

    def __call__(
        self, requests: Sequence[Request], progress: Callable[[int], None] | None = None
    ) -> list[Likelihood]:
        """The log-likelihood of each request.

        Args:
            requests: a context with its continuation has at most one token more than the model's
                positions.
            progress: called with the number of requests that were computed.

        Raises:
            WeightsError: one of them is not finite.
        """
        likelihoods: list[Any] = [None] * len(requests)
        sequences = list(sequenced(requests, self.share))
        with self.model.on(self.mesh):
            for shape, rows in self.batches([sequence.length for sequence in sequences]):
                placed = [[sequences[i].members for i in row] for row in rows]
                arrays, places = layout(requests, placed, shape)
                logps, is_top1 = jax.device_get(self._program(self.params, arrays))
                for member, row, start, end in places:
                    logp = float(logps[row, start:end].sum(dtype=np.float64))
                    likelihoods[member] = Likelihood(logp, bool(is_top1[row, start:end].all()))
                if not np.isfinite(logps).all():
                    raise WeightsError(
                        "the model's log-probabilities are not finite; its weights hold NaN, or "
                        "overflow in this dtype"
                    )
                if progress:
                    progress(len(places))
        return likelihoods

    def batches(self, lengths: Sequence[int]) -> Iterator[tuple[Shape, list[list[int]]]]:
        """Shapes of all rows, and the sequences in each row; sequences of similar lengths are
        computed together."""
        shards, config = meshes.data_shards(self.mesh), self.model.config
        attention = attention_cost(config.width, config.heads, self.model.compute.attention)
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        total, before = sum(lengths), 0
        count = -(-total // (self.tokens * shards))  # of groups, each of about as many tokens
        divided: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            middle = before + lengths[i] / 2
            divided[int(middle * count / total)].append(i)
            before += lengths[i]
        groups = [group for group in divided if group]

        def packed(group: list[int], length: int) -> list[list[int]]:
            return pack([lengths[i] for i in group], length - 1)

        # one place more: a row's last token is predicted by the place before
        longest = {lengths[group[0]] for group in groups}
        if not attention:  # a long row costs as much as several short ones, and has less padding
            for group in groups:
                spare = lengths[group[-1]] * (shards > 1)  # the shards' rows end unevenly
                longest.add(-(-sum(lengths[i] for i in group) // shards) + spare)
        rows = sorted({bucket(length + 1, 8, FINE) for length in longest})
        needed = np.full((len(rows), len(groups)), np.inf)
        for i, length in enumerate(rows):
            for j, group in enumerate(groups):
                if lengths[group[0]] < length:
                    needed[i, j] = -(-len(packed(group, length)) // shards)

        def cost(shape: Shape) -> float:
            return shape.rows * shape.length * (1 + attention * shape.length)

        shapes = choose_shapes(rows, needed, cost, updates=len(groups)) if groups else []
        for j, group in enumerate(groups):
            fits = [s for s in shapes if s.rows >= needed[rows.index(s.length), j]]
            shape = min(fits, key=cost)
            inside = [[group[i] for i in row] for row in packed(group, shape.length)]
            yield Shape(shape.rows * shards, shape.length), inside

    def _logps(self, params: Any, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, head = self.model.apply(params, rows)
        targets, learned = rows["targets"], rows["loss_mask"]
        out = token_logps(hidden, head, targets, learned, **self.model.head_options)
        return out.logps, out.is_top1


def sequenced(requests: Sequence[Request], share: bool = True) -> Iterator[Sequenced]:
    """Group requests by context."""
    open_ones: dict[Any, Sequenced] = {}
    for i, (context, continuation) in enumerate(requests):
        key = tuple(context) if share else i
        added = len(continuation)
        last = open_ones.get(key)
        if last is not None and last.length + added <= max(ROOM, 2 * len(context)):
            open_ones[key] = Sequenced([*last.members, i], last.length + added)
            continue
        if last is not None:
            yield last
        open_ones[key] = Sequenced([i], len(context) - 1 + added)
    yield from open_ones.values()


def layout(
    requests: Sequence[Request], rows: Sequence[Sequence[Sequence[int]]], shape: Shape
) -> tuple[dict[str, np.ndarray], list[tuple[int, int, int, int]]]:
    """Arrays of a batch (see data/batches.py), and (request, row, start, end) of the predictions.

    `targets[r, t + 1]` is the token that place t predicts; it differs from `tokens[r, t + 1]` at
    the end of a continuation.
    """
    names = ("tokens", "positions", "segment_ids", "sides", "targets")
    arrays = {name: np.zeros(shape, np.int32) for name in names}
    tokens, positions, segment_ids, sides, targets = arrays.values()
    loss_mask = arrays["loss_mask"] = np.zeros(shape, bool)
    places = []
    for r, row in enumerate(rows):
        at = 0
        for segment, members in enumerate(row):
            start, context = at, requests[members[0]].context
            before = len(context) - 1
            tokens[r, at : at + before] = context[:-1]
            positions[r, at : at + before] = np.arange(before)
            at += before
            for k, member in enumerate(members):
                continuation = requests[member].continuation
                end = at + len(continuation)
                tokens[r, at] = context[-1]
                tokens[r, at + 1 : end] = continuation[:-1]
                positions[r, at:end] = before + np.arange(end - at)
                sides[r, at:end] = k + 1
                targets[r, at + 1 : end + 1] = continuation
                loss_mask[r, at + 1 : end + 1] = True
                places.append((member, r, at + 1, end + 1))
                at = end
            segment_ids[r, start:at] = segment + 1
    return arrays, places
