"""Compiled programs of the sampler: prefill, admit, decode, resize.

Shapes: R rows, M prompts of a prefill, T tokens of its longest prompt (both rounded up), W slots of
the cache, C steps of a decoding, V vocabulary. All programs are pure functions of arrays; each is
compiled once per shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easyaira.distributed.compiler import QUICK
from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain
from easyaira.generation.forward import Forward, Prefilled, Weights, apart, together
from easyaira.generation.processors import Sampling, draw, largest, logps_of, process, uniform
from easyaira.models.model import Model

STEPS = 32  # tokens per row and call of `decode`


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


class Steps(NamedTuple):
    """Tokens of C steps and their log-probabilities, [R, C]; those of a row begin at 0."""

    tokens: jax.Array
    logps: jax.Array
    counts: jax.Array  # [R] tokens of the row in these steps


class Programs:
    """The programs of one model and one way to sample.

    Args:
        others: programs of the same model, reused where they are equal: a prefill does not depend
            on the way to sample.
    """

    weights: Any
    held: Any
    with_head: Any
    prefill: Any
    admit: Any
    decode: Any

    def __init__(self, model: Model, sampling: Sampling, others: Iterable[Programs] = ()):
        self.sampling = sampling.compiled
        self.forward = Forward(model.cached(), sampling.repetition_penalty != 1)
        jit = partial(jax.jit, compiler_options=QUICK.get(jax.default_backend()))
        self.empty = jit(_empty, static_argnums=(1, 2))
        self.resize = jit(_resize, static_argnums=1)
        alike = [one for one in others if one.forward.counted == self.forward.counted]
        if alike:
            self.weights, self.prefill = alike[0].weights, alike[0].prefill
            self.held, self.with_head = alike[0].held, alike[0].with_head
        else:
            self.weights, self.prefill = jit(self.forward.weights), jit(self.forward.prefill)
            self.held = jit(self.forward.held, static_argnums=0)
            self.with_head = jit(self.forward.with_head)
        if same := [one for one in alike if one.sampling == self.sampling]:
            self.admit, self.decode = same[0].admit, same[0].decode
        else:
            rows = _Rows(self.forward, self.sampling)
            self.admit = jit(rows.admit, donate_argnums=0)
            self.decode = jit(rows.decode, donate_argnums=1)


def _empty(prefilled: Prefilled, rows: int, slots: int) -> State:
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


def _resize(state: State, slots: int, rows) -> State:
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


@dataclass(frozen=True)
class _Rows:
    """Pure functions of the rows that are being answered."""

    forward: Forward
    sampling: Sampling

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

    def admit(
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

    def decode(
        self, weights: Weights, state: State, seed, running, steps, enough
    ) -> tuple[State, Steps]:
        """Decode at most `steps` tokens of every row in `running`; return earlier when no more
        than `enough` rows are running."""
        params = self.forward.parameters(weights)
        R = len(state.tokens)
        before = state.counts
        state = state._replace(running=state.running & running)

        def step(carry):
            i, state, tokens_RC, logps_RC = carry
            layout = self.forward.layout(
                state.tokens[:, None],
                state.lengths[:, None],
                jnp.where(state.running, state.lengths + 1, 0)[:, None],
                jnp.broadcast_to(state.clock, (R, 1)),
            )
            cache = together(state.cache)
            hidden, _, cache = self.forward.model.apply_cached(params, layout, cache)
            logits = self.forward.logits(hidden[:, 0], weights.head)
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


def _read(tokens, logps, counts) -> Steps:
    """Results for the host, replicated so that every host can read them."""
    whole = constrain(tokens, None, None), constrain(logps, None, None), constrain(counts, None)
    return Steps(*whole)
