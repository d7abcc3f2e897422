"""Flash attention for CPUs: loops over tiles of queries and keys that skip masked tiles.

The algorithm is FlashAttention-2 (Dao, 2023; Dao et al., 2022): an online softmax over tiles of
keys, and a backward pass that recomputes the attention weights from the log-sum-exp of each query.
The rows of a device are one stream of tokens. Which tiles of keys a tile of queries needs is known
only at run time, so a text pays for its own length, whatever the length of its row.

Shapes: see layers.py; S places of the stream, G query heads per key head, Q queries and T keys of
a tile.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from easyaira.models.cache import MASKED
from easyaira.models.layers import Scores
from easyaira.models.layout import sees
from easyaira.models.product import NOT_NEGATIVE, einsum, packed, row_dot, unpacked

TILE = 64  # queries, and keys: whole tiles are computed, and smaller ones cost more per operation
FLOOR = -1e30  # below any score, above MASKED: a masked key has weight 0, even alone


class Tokens(NamedTuple):
    """What decides the mask, [S] each.

    Attributes:
        segments: of all rows; each has its own number. 0: padding.
        sides: as in data/batches.py.
        positions: of each token in its text; None without a window.
        window: scalar, see `attention.Near`; None: none.
    """

    segments: jax.Array
    sides: jax.Array
    positions: jax.Array | None
    window: jax.Array | None


class Needed(NamedTuple):
    """The tiles of keys that each tile of queries needs, [tiles] each.

    Those from `start` hold the shared part of a text that began before the tile, those from `own`
    the rest.
    """

    start: jax.Array
    shared: jax.Array  # how many from `start`
    own: jax.Array
    count: jax.Array

    def tile(self, i: jax.Array, t: jax.Array) -> jax.Array:
        """Index of the t-th tile of keys for the i-th of queries."""
        start, shared, own = (_at(x, i) for x in self[:3])
        return jnp.where(t < shared, start + t, own + t - shared)


def needed(tokens: Tokens, causal: bool) -> Needed:
    """Find the tiles of keys. Texts are contiguous, and so is each side of a text, so only a tile's
    first text may reach into earlier tiles, and only its last text into later ones."""
    place = jnp.arange(len(tokens.segments), dtype=jnp.int32)

    def runs(*ids: jax.Array) -> tuple[jax.Array, jax.Array]:  # first and last place of each run
        changes = jnp.any(jnp.stack([x[1:] != x[:-1] for x in ids]), 0)
        starts = jnp.pad(changes, (1, 0), constant_values=True)
        ends = jnp.pad(changes, (0, 1), constant_values=True)
        last = lax.cummin(jnp.where(ends, place, len(place)), reverse=True)
        return lax.cummax(jnp.where(starts, place, 0)), last

    (text, _), (side, side_end) = runs(tokens.segments), runs(tokens.segments, tokens.sides)
    padding = tokens.segments == 0
    side, side_end = jnp.where(padding, place, side), jnp.where(padding, place, side_end)
    if tokens.window is not None:
        side = jnp.maximum(side, place - tokens.window + 1)
    first, last = (slice(start, None, TILE) for start in (0, TILE - 1))  # places of each tile
    own = side[first] // TILE
    end = (place if causal else side_end)[last] // TILE + 1
    start = text[first]
    has_shared = (tokens.sides[start] == 0) & (tokens.sides[first] != 0) & ~padding[first]
    shared_end = jnp.where(has_shared, side_end[start] // TILE + 1, 0)
    start = start // TILE
    shared = jnp.maximum(jnp.minimum(shared_end, own) - start, 0)
    return Needed(start, shared, own, shared + end - own)


@partial(jax.jit, static_argnames=("scores", "causal"), inline=True)  # traced once per shape
def attention_by_tiles(
    q_RTHN: jax.Array,
    k_RTKN: jax.Array,
    v_RTKN: jax.Array,
    segment_ids_RT: jax.Array,
    sides_RT: jax.Array,
    positions_RT: jax.Array | None = None,
    window: jax.Array | None = None,
    *,
    scores: Scores,
    causal: bool = True,
) -> jax.Array:
    """Attention under the mask `attention.visible`, [R, T, H, N]. Queries that see no key get 0."""
    (R, T, H, N), K = q_RTHN.shape, k_RTKN.shape[2]
    row = jnp.arange(R, dtype=jnp.int32)[:, None]
    segments = jnp.where(segment_ids_RT > 0, segment_ids_RT * R + row, 0)

    def stream(x: jax.Array) -> jax.Array:
        x = x.reshape(R * T, *x.shape[2:])
        return jnp.pad(x, ((0, -R * T % TILE), *((0, 0),) * (x.ndim - 1)))

    positions = None if positions_RT is None else stream(positions_RT)
    tokens = Tokens(stream(segments), stream(sides_RT), positions, window)
    q_KGSN = stream(q_RTHN).reshape(-1, K, H // K, N).transpose(1, 2, 0, 3)
    k_KSN, v_KSN = (stream(x).transpose(1, 0, 2) for x in (k_RTKN, v_RTKN))
    out_KGSN = _attend(q_KGSN, k_KSN, v_KSN, tokens, scores, causal)
    return out_KGSN.transpose(2, 0, 1, 3)[: R * T].reshape(R, T, H, N)


def _cut(x: jax.Array, tile: jax.Array, axis: int = -2) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, tile * TILE, TILE, axis % x.ndim, **NOT_NEGATIVE)


def _put(x: jax.Array, new: jax.Array, tile: jax.Array, axis: int = -2) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, new, tile * TILE, axis % x.ndim, **NOT_NEGATIVE)


def _at(x: jax.Array, tile: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, tile, keepdims=False, **NOT_NEGATIVE)


def _mask(tokens: Tokens, i: jax.Array, j: jax.Array, causal: bool) -> jax.Array:
    """Mask of a tile of queries and one of keys, [Q, T]."""
    queries, keys = (
        jax.tree.map(partial(_cut, tile=tile, axis=0), tokens._replace(window=None))
        for tile in (i, j)
    )
    mask = sees(queries.segments[:, None], keys.segments, queries.sides[:, None], keys.sides)
    if causal:
        place = jnp.arange(TILE)
        mask &= i * TILE + place[:, None] >= j * TILE + place
    if tokens.window is not None:
        mask &= queries.positions[:, None] - keys.positions < tokens.window
    return mask


def _scores(q_tile, k_tile, scores, mask):
    """Scores of a tile [K, G, Q, T], without and with the mask."""
    products = einsum("kgqn,ktn->kgqt", q_tile, k_tile, jnp.float32)
    unmasked = scores.of(products, q_tile.shape[-1], None)
    return unmasked, jnp.where(mask, unmasked, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_KGSN, k_KSN, v_KSN, tokens, scores, causal):
    """Attention of the stream, [K, G, S, N]."""
    return _forward(q_KGSN, k_KSN, v_KSN, tokens, scores, causal)[0]


def _forward(q, k, v, tokens, scores, causal):
    tiles = needed(tokens, causal)

    def queries(i, carry):
        q_tile = _cut(q, i)
        of_query = q_tile.shape[:-1]

        def keys(t, sums):
            largest, total, out = sums
            j = tiles.tile(i, t)
            _, here = _scores(q_tile, _cut(k, j), scores, _mask(tokens, i, j, causal))
            new = jnp.maximum(largest, here.max(-1))
            weights, fade = jnp.exp(here - new[..., None]), jnp.exp(largest - new)
            out_tile = einsum("kgqt,ktn->kgqn", weights.astype(v.dtype), _cut(v, j), jnp.float32)
            return new, total * fade + weights.sum(-1), out * fade[..., None] + out_tile

        zeros = jnp.full(of_query, FLOOR), jnp.zeros(of_query), jnp.zeros(q_tile.shape)
        largest, total, out = lax.fori_loop(0, _at(tiles.count, i), keys, zeros)
        total = jnp.where(total > 0, total, 1)  # no key
        out = out / total[..., None]
        return _put(carry[0], out, i), _put(carry[1], largest + jnp.log(total), i, -1)

    start = jnp.zeros(q.shape), jnp.zeros(q.shape[:-1])  # XLA's CPU writes no 16-bit floats
    out, lse = lax.fori_loop(0, len(tiles.count), queries, start)
    out = out.astype(q.dtype)
    return out, (*map(packed, (q, k, v, out)), tokens, lse)


def _backward(scores, causal, saved, d_out):
    q, k, v, out = (unpacked(x, d_out.dtype) for x in saved[:4])
    tokens, lse = saved[4:]
    tiles = needed(tokens, causal)
    delta = row_dot(d_out, out)  # appendix B.2 of Dao et al. (2022)
    divisor = scores.divisor or math.sqrt(q.shape[-1])

    def queries(i, carry):
        d_q, d_k, d_v = carry
        q_tile, d_tile = _cut(q, i), _cut(d_out, i)
        lse_tile, delta_tile = (_cut(x, i, -1)[..., None] for x in (lse, delta))

        def keys(t, sums):
            d_q_tile, d_k, d_v = sums
            j = tiles.tile(i, t)
            k_tile = _cut(k, j)
            capped, here = _scores(q_tile, k_tile, scores, _mask(tokens, i, j, causal))
            weights = jnp.exp(here - lse_tile)
            of_value = einsum("kgqt,kgqn->ktn", weights.astype(q.dtype), d_tile, jnp.float32)
            d_weights = einsum("kgqn,ktn->kgqt", d_tile, _cut(v, j), jnp.float32)
            d_products = weights * (d_weights - delta_tile) / divisor
            if scores.cap is not None:
                d_products *= 1 - (capped / scores.cap) ** 2  # tanh' = 1 - tanh^2
            d_products = d_products.astype(q.dtype)
            of_key = einsum("kgqt,kgqn->ktn", d_products, q_tile, jnp.float32)
            of_query = einsum("kgqt,ktn->kgqn", d_products, k_tile, jnp.float32)
            d_k, d_v = _put(d_k, _cut(d_k, j) + of_key, j), _put(d_v, _cut(d_v, j) + of_value, j)
            return d_q_tile + of_query, d_k, d_v

        start = jnp.zeros(q_tile.shape), d_k, d_v
        d_q_tile, d_k, d_v = lax.fori_loop(0, _at(tiles.count, i), keys, start)
        return _put(d_q, d_q_tile, i), d_k, d_v

    start = tuple(jnp.zeros(x.shape) for x in (q, k, v))
    d_q, d_k, d_v = lax.fori_loop(0, len(tiles.count), queries, start)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
