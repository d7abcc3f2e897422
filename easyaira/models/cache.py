"""Keys and values of earlier tokens, for generation. Shapes: see layers.py; G query heads share a
key/value head, W slots.

A layer's cache is a ring: every row writes its next token to the same slot, `clock % W`, so that
rows of any lengths advance together without padding between their tokens. A row's n tokens are in
the last n slots up to the clock, newest last. Keys are rotated before they are cached.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain
from easyaira.models.layers import Scores
from easyaira.models.product import einsum, few_at_a_time, packed, unpacked

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
        lengths_R: tokens of each row, with the newest.
        clock: tokens written to the ring before the newest.
        scores, window: see attention.py.
    """
    R, K, W, N = kept[0].shape
    age_W = (clock - jnp.arange(W)) % W  # 0: the newest; the key's position is lengths - 1 - age

    def of_rows(q_RKGN, k_RKWN, v_RKWN, lengths_R):
        k_RKWN, v_RKWN = (unpacked(x, q_R1HN.dtype) for x in (k_RKWN, v_RKWN))
        products = einsum("rkgn,rkwn->rkgw", q_RKGN, k_RKWN, jnp.float32)
        mask_RW = age_W < lengths_R[:, None]
        if window is not None:
            mask_RW &= age_W < window
        visible = jnp.where(mask_RW[:, None, None], scores.of(products, N, age_W), MASKED)
        weights = jax.nn.softmax(visible, axis=-1).astype(v_RKWN.dtype)
        return einsum("rkgw,rkwn->rkgn", weights, v_RKWN, v_RKWN.dtype)

    rows = (q_R1HN.reshape(R, K, -1, N), *kept, lengths_R)
    if kept[0].dtype == q_R1HN.dtype:
        out_RKGN = of_rows(*rows)
    else:  # XLA converts 16-bit factors to float32 in memory
        out_RKGN = few_at_a_time(of_rows, rows, K * W * N)
    return unpacked(out_RKGN, q_R1HN.dtype).reshape(q_R1HN.shape)
