"""Compiled programs of the sampler: prefill, admit, decode, resize.

Shapes: R rows, M prompts of a prefill, T tokens of its longest prompt (both rounded up), W slots of
the cache, C steps of a decoding, V vocabulary. All programs are pure functions of arrays; each is
compiled once per shape.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easyaira.distributed.compiler import QUICK
from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain, on_one_cpu
from easyaira.distributed.tree import by_path
from easyaira.generation.processors import Sampling, draw, largest, logps_of, process, uniform
from easyaira.models.layers import capped
from easyaira.models.linear import BY_ROWS
from easyaira.models.model import Model
from easyaira.models.product import by_rows, packed, unpacked

STEPS = 32  # tokens per row and call of `decode`


class Weights(NamedTuple):
    """Weights for generation: matrices in the computing dtype, tables packed (see product.py),
    layers apart, the head with a row for each token."""

    params: Any
    head: jax.Array  # [V, D]


class State(NamedTuple):
    """Rows that are being answered. A row that is not running holds leftovers."""

    cache: Any  # keys and values of each layer, [R, K, W, N]
    clock: jax.Array  # tokens written to the cache, see models/cache.py
    tokens: jax.Array  # [R] the newest token, not yet in the cache
    lengths: jax.Array  # [R] tokens in the cache
    counts: jax.Array  # [R] tokens of the answer
    limits: jax.Array  # [R] maximal number of them
    running: jax.Array  # [R]
    streams: jax.Array  # [R] number of the row's random stream
    seen: jax.Array | None  # [R, V] tokens of the row; None without a repetition penalty


class Prefilled(NamedTuple):
    cache: Any  # keys and values of each layer, [M, K, T, N]
    lengths: jax.Array  # [M]
    logits: jax.Array  # [M, V] of the first token of an answer
    seen: jax.Array | None  # [M, V]


class Steps(NamedTuple):
    """Tokens of C steps and their log-probabilities, [R, C]; those of a row begin at 0."""

    tokens: jax.Array
    logps: jax.Array
    counts: jax.Array  # [R] tokens of the row in these steps


def apart(tree: Any) -> Any:
    """Split stacked layers, so that none has to be copied out of the stack for each token."""
    return jax.tree.map(lambda leaf: tuple(leaf[i] for i in range(len(leaf))), tree)


def together(tree: Any) -> Any:
    """Stack layers again. XLA removes the stack, since each layer is taken out of it again."""
    return jax.tree.map(jnp.stack, tree, is_leaf=lambda node: type(node) is tuple)


def _by_rows(layers: Any) -> Any:
    """On a single CPU, with the kernels [L, K, ...] held by rows."""
    if not on_one_cpu():
        return layers

    def held(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        return {BY_ROWS: jnp.moveaxis(leaf, 1, -1)}

    return jax.tree_util.tree_map_with_path(held, layers)


class Programs:
    """The programs of one model and one way to sample."""

    def __init__(self, model: Model, sampling: Sampling):
        self.model, self.sampling = model.cached(), sampling
        jit = partial(jax.jit, compiler_options=QUICK.get(jax.default_backend()))
        self.weights = jit(self._weights)
        self.prefill = jit(self._prefill)
        self.empty = jit(self._empty, static_argnums=(1, 2))
        self.admit = jit(self._admit, donate_argnums=0)
        self.decode = jit(self._decode, donate_argnums=1)
        self.resize = jit(self._resize, static_argnums=1)

    def _layers(self) -> tuple[str, str]:
        """Path of the scanned layers in the parameters."""
        stacked = next(row.ours for row in self.model.rows if "{}" in row.theirs)
        backbone, layers, *_ = stacked.split("/")
        return backbone, layers

    def _weights(self, params: Any) -> Weights:
        dtype = self.model.compute.dtype
        layout = self._layout(*(jnp.zeros((1, 1), jnp.int32),) * 2, jnp.ones((1, 1), jnp.int32))
        _, head, _ = self.model.apply_cached(params, layout)
        matrices = {path for path in by_path(params) if path.endswith(("/kernel", "/embedding"))}

        def cast(path, leaf):
            name = "/".join(str(key.key) for key in path)
            if name not in matrices:
                return leaf
            leaf = leaf.astype(dtype)
            return packed(leaf) if name.endswith("/embedding") else leaf

        params = jax.tree_util.tree_map_with_path(cast, params)
        backbone, layers = self._layers()
        inner = params[backbone] | {layers: apart(_by_rows(params[backbone][layers]))}
        return Weights(params | {backbone: inner}, constrain(head.astype(dtype).T, "tp", None))

    def _params(self, weights: Weights) -> Any:
        backbone, layers = self._layers()
        params = jax.tree.map(lambda x: unpacked(x, self.model.compute.dtype), weights.params)
        inner = params[backbone]
        return params | {backbone: inner | {layers: together(inner[layers])}}

    def _layout(self, tokens, positions, segment_ids, sides=None):
        sides = jnp.zeros_like(tokens) if sides is None else sides
        names = ("tokens", "positions", "segment_ids", "sides")
        return dict(zip(names, (tokens, positions, segment_ids, sides), strict=True))

    def _logits(self, hidden: jax.Array, head: jax.Array) -> jax.Array:
        """Float32 logits [R, V] of hidden states [R, D]."""
        logits = by_rows(hidden, head, jnp.float32)
        logits = capped(logits, self.model.logit_cap)
        return constrain(logits, BATCH_AXES, None)[:, : self.model.vocab_size]

    def _choose(self, logits, seed, streams, counts, seen):
        """Next token of each row [R] and its log-probability."""
        processed = process(logits, self.sampling, seen, counts)
        if self.sampling.greedy:
            tokens = largest(processed)
        else:
            tokens = draw(processed, uniform(seed, streams, counts))
        tokens = tokens.astype(jnp.int32)
        return tokens, logps_of(logits, tokens)

    def _goes_on(self, tokens, counts, limits):
        ended = jnp.isin(tokens, jnp.array(self.sampling.end_ids, jnp.int32))
        return ~ended & (counts < limits)

    def _prefill(self, weights: Weights, tokens: jax.Array, lengths: jax.Array) -> Prefilled:
        """Keys and values of prompts [M, T], padded on the right, and the logits after them."""
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        real = place < lengths[:, None]
        layout = self._layout(tokens, place, real.astype(jnp.int32))
        hidden, _, cache = self.model.apply_cached(self._params(weights), layout)
        rows = jnp.arange(len(tokens))
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = jnp.zeros((len(tokens), self.model.vocab_size), bool)
            seen = seen.at[rows[:, None], tokens].max(real)
        logits = self._logits(hidden[rows, lengths - 1], weights.head)
        return Prefilled(apart(cache), lengths, logits, seen)

    def _empty(self, prefilled: Prefilled, rows: int, slots: int) -> State:
        """A state without running rows."""
        zeros = jnp.zeros(rows, jnp.int32)

        def cache(leaf):
            array = jnp.zeros((rows, leaf.shape[1], slots, leaf.shape[3]), leaf.dtype)
            return constrain(array, BATCH_AXES, "tp", None, None)

        seen = prefilled.seen
        seen = None if seen is None else jnp.zeros((rows, seen.shape[1]), bool)
        caches = jax.tree.map(cache, prefilled.cache)
        fields = (zeros, zeros, zeros, zeros, zeros > 0, zeros.astype(jnp.uint32), seen)
        return State(caches, jnp.int32(0), *fields)

    def _admit(
        self, state: State, prefilled: Prefilled, seed, count, sources, rows, limits, streams
    ) -> tuple[State, Steps]:
        """Give the places `rows[:count]` to the prompts `sources[:count]`, and choose their first
        tokens. The last four arguments are [R], by order of admission."""
        R = len(state.tokens)
        order = jnp.arange(R)
        # by place in the state: which admission, and R for none
        admission = jnp.full(R, R).at[jnp.where(order < count, rows, R)].set(order, mode="drop")
        new = admission < R
        index = jnp.minimum(admission, R - 1)
        source = sources[index]

        def copy(i, caches):
            length = prefilled.lengths[sources[i]]

            def put(old, prompt):
                row = jax.lax.dynamic_index_in_dim(prompt, sources[i], keepdims=False)
                space = old.shape[2] - row.shape[1]
                row = jnp.pad(row, ((0, 0), (0, max(space, 0)), (0, 0)))[:, : old.shape[2]]
                row = jnp.roll(row, state.clock - length, axis=1)
                return jax.lax.dynamic_update_index_in_dim(old, row, rows[i], 0)

            return jax.tree.map(put, caches, prefilled.cache)

        caches = jax.lax.fori_loop(0, count, copy, state.cache)
        streams = jnp.where(new, streams[index], state.streams)
        seen = state.seen
        if seen is not None:
            seen = jnp.where(new[:, None], prefilled.seen[source], seen)
        zeros = jnp.zeros_like(state.counts)
        tokens, logps = self._choose(prefilled.logits[source], seed, streams, zeros, seen)
        limits = jnp.where(new, limits[index], state.limits)
        counts = jnp.where(new, 1, state.counts)
        tokens = jnp.where(new, tokens, state.tokens)
        if seen is not None:
            seen = seen.at[order, tokens].max(new)
        running = jnp.where(new, self._goes_on(tokens, counts, limits), state.running)
        lengths = jnp.where(new, prefilled.lengths[source], state.lengths)
        state = State(caches, state.clock, tokens, lengths, counts, limits, running, streams, seen)
        return state, _read(tokens[:, None], logps[:, None], new * 1)

    def _decode(
        self, weights: Weights, state: State, seed, running, steps, enough
    ) -> tuple[State, Steps]:
        """Decode at most `steps` tokens of every row in `running`; return earlier when no more
        than `enough` rows are running."""
        params = self._params(weights)
        R = len(state.tokens)
        before = state.counts
        state = state._replace(running=state.running & running)

        def step(carry):
            i, state, tokens_RC, logps_RC = carry
            layout = self._layout(
                state.tokens[:, None],
                state.lengths[:, None],
                jnp.where(state.running, state.lengths + 1, 0)[:, None],
                jnp.broadcast_to(state.clock, (R, 1)),
            )
            cache = together(state.cache)
            hidden, _, cache = self.model.apply_cached(params, layout, cache)
            logits = self._logits(hidden[:, 0], weights.head)
            chosen = self._choose(logits, seed, state.streams, state.counts, state.seen)
            tokens, logps = chosen
            tokens = jnp.where(state.running, tokens, state.tokens)
            counts = state.counts + state.running
            seen = state.seen
            if seen is not None:
                seen = seen.at[jnp.arange(R), tokens].set(True)
            put = jax.lax.dynamic_update_slice_in_dim
            tokens_RC = put(tokens_RC, tokens[:, None], i, axis=1)
            logps_RC = put(logps_RC, logps[:, None], i, axis=1)
            state = State(
                apart(cache),
                state.clock + 1,
                tokens,
                state.lengths + state.running,
                counts,
                state.limits,
                state.running & self._goes_on(tokens, counts, state.limits),
                state.streams,
                seen,
            )
            return i + 1, state, tokens_RC, logps_RC

        def unfinished(carry):
            i, state, *_ = carry
            return (i < steps) & (state.running.sum() > enough)

        tokens_RC, logps_RC = jnp.zeros((R, STEPS), jnp.int32), jnp.zeros((R, STEPS))
        carry = jax.lax.while_loop(unfinished, step, (0, state, tokens_RC, logps_RC))
        _, state, tokens_RC, logps_RC = carry
        return state, _read(tokens_RC, logps_RC, state.counts - before)

    def _resize(self, state: State, slots: int, rows) -> State:
        """Keep these rows [R'], with the newest tokens in `slots` slots."""

        def cache(leaf):
            W, leaf = leaf.shape[2], leaf[rows]
            if W != slots:
                leaf = jnp.roll(leaf, -state.clock, axis=2)  # the newest token in the last slot
                leaf = jnp.pad(leaf, ((0, 0), (0, 0), (max(slots - W, 0), 0), (0, 0)))
            return constrain(leaf[:, :, -slots:], BATCH_AXES, "tp", None, None)

        clock = state.clock if jax.tree.leaves(state.cache)[0].shape[2] == slots else jnp.int32(0)
        rest = [None if field is None else field[rows] for field in state[2:]]
        return State(jax.tree.map(cache, state.cache), clock, *rest)


def _read(tokens, logps, counts) -> Steps:
    """Results for the host, replicated so that every host can read them."""
    whole = constrain(tokens, None, None), constrain(logps, None, None), constrain(counts, None)
    return Steps(*whole)
