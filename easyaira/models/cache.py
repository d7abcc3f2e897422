"""Keys and values of earlier tokens, for generation. Shapes: see layers.py; G query heads share a
key/value head, W slots.

A layer's cache is a ring: every row writes its next token to the same slot, `clock % W`, so that
rows of any lengths advance together without padding between their tokens. A row's n tokens are in
the last n slots up to the clock, newest last. Keys are rotated before they are cached.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain
from easyaira.models.layers import Scores
from easyaira.models.product import einsum, few_at_a_time, packed, unpacked

TILE = 64  # slots
MASKED = jnp.finfo(jnp.float32).min


class Cache(nn.Module):
    """Keys and values of one layer, [R, K, W, N] each, in the collection `cache`.

    Without a cache, store those of a prompt and return None. With one, write those of the next
    token to the slot at the clock, and return all of them, packed (see product.py).
    """

    @nn.compact
    def __call__(
        self, k_RTKN: jax.Array, v_RTKN: jax.Array, clock: jax.Array
    ) -> tuple[jax.Array, jax.Array] | None:
        decoding = self.has_variable("cache", "keys")
        kept = []
        for name, new_RTKN in (("keys", k_RTKN), ("values", v_RTKN)):
            new_RKTN = packed(new_RTKN.swapaxes(1, 2))
            if decoding:
                cached = self.get_variable("cache", name)
                slot = clock % cached.shape[2]
                new_RKTN = jax.lax.dynamic_update_slice_in_dim(cached, new_RKTN, slot, axis=2)
            new_RKTN = constrain(new_RKTN, BATCH_AXES, "tp", None, None)
            self.put_variable("cache", name, new_RKTN)
            kept.append(new_RKTN)
        return (kept[0], kept[1]) if decoding else None


def attend(
    q_R1HN: jax.Array,
    kept: tuple[jax.Array, jax.Array],
    lengths_R: jax.Array,
    clock: jax.Array,
    scores: Scores,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """Attention of each row's newest token to all tokens of its row, [R, 1, H, N].

    Args:
        kept: keys and values of all slots, [R, K, W, N], packed.
        lengths_R: tokens of each row, including the newest; 0 for a row whose output is not used.
        clock: tokens written to the ring before the newest.
        scores, window: see attention.py.
    """
    R, K, W, N = kept[0].shape
    age_W = (clock - jnp.arange(W)) % W  # 0: the newest; the key's position is lengths - 1 - age

    def masked(q_RKGN, k_RKWN, lengths_R, age_W):
        products = einsum("rkgn,rkwn->rkgw", q_RKGN, k_RKWN, jnp.float32)
        mask_RW = age_W < lengths_R[:, None]
        if window is not None:
            mask_RW &= age_W < window
        return jnp.where(mask_RW[:, None, None], scores.of(products, N, age_W), MASKED)

    def at_once(q_RKGN, k_RKWN, v_RKWN, lengths_R):
        weights = jax.nn.softmax(masked(q_RKGN, k_RKWN, lengths_R, age_W), axis=-1)
        return einsum("rkgw,rkwn->rkgn", weights.astype(v_RKWN.dtype), v_RKWN, v_RKWN.dtype)

    def by_tiles(q_RKGN, lengths_R, rows_R):
        """The softmax's sums so far, from the newest tile back to the first with a token."""
        S = math.gcd(W, TILE)
        newest = clock % W
        tokens = lengths_R.max() if window is None else jnp.minimum(lengths_R.max(), window)
        tiles = jnp.where(tokens > 0, -(-(tokens + S - 1 - newest % S) // S), 0)

        def visit(i, sums):
            largest, total, out = sums
            first = (newest // S - i) % (W // S) * S
            place, shape = (rows_R[0], 0, first, 0), (len(rows_R), K, S, N)
            k, v = (jax.lax.dynamic_slice(x, place, shape) for x in kept)
            k, v = unpacked(k, q_RKGN.dtype), unpacked(v, q_RKGN.dtype)
            ages = jax.lax.dynamic_slice_in_dim(age_W, first, S)
            tile = masked(q_RKGN, k, lengths_R, ages)
            larger = jnp.maximum(largest, tile.max(-1))
            weights, old = jnp.exp(tile - larger[..., None]), jnp.exp(largest - larger)
            new = einsum("rkgw,rkwn->rkgn", weights.astype(v.dtype), v, jnp.float32)
            return larger, total * old + weights.sum(-1), out * old[..., None] + new

        zeros = jnp.zeros(q_RKGN.shape, jnp.float32)
        sums = zeros[..., 0] + MASKED, zeros[..., 0], zeros
        _, total, out = jax.lax.fori_loop(0, jnp.minimum(tiles, W // S), visit, sums)
        return out / jnp.maximum(total, 1e-30)[..., None]  # rounded later, for all rows at once

    q_RKGN = q_R1HN.reshape(R, K, -1, N)
    if kept[0].dtype == q_R1HN.dtype:
        out_RKGN = at_once(q_RKGN, *kept, lengths_R)
    else:  # XLA converts 16-bit factors to float32 in memory
        rows = (q_RKGN, lengths_R, jnp.arange(R))
        out_RKGN = few_at_a_time(by_tiles, rows, K * W * N).astype(q_R1HN.dtype)
    return unpacked(out_RKGN, q_R1HN.dtype).reshape(q_R1HN.shape)
