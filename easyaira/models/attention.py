"""Attention within the rows of a batch: one function, one contract (`visible`), several ways to
compute it. Shapes: see layers.py; S keys.

- `xla`: everywhere. Rows longer than a block are cut into blocks of queries, each of which sees the
  keys up to its end; its scores are computed again in the backward pass, so that memory grows with
  the length and not with its square.
- `cudnn`: cuDNN's flash attention on NVIDIA GPUs, in 16 bits. It is told by a mask who sees whom.
- `pallas`: a flash attention for GPUs that is told one number for each key, see flash.py.
- `splash`: the Pallas kernel for TPUs that comes with JAX, which knows segments and skips blocks
  that no query sees.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import by_device, constrain
from easyaira.models.flash import ends, flash
from easyaira.models.layers import Compute, Dropout, by_features
from easyaira.models.splash import splash

BLOCK = 512  # queries
MAX_BLOCKS = 16  # of a row: they are unrolled in the program


def visible(
    segment_ids_RT: jax.Array,
    sides_RT: jax.Array,
    queries: slice = slice(None),
    keys: slice = slice(None),
    *,
    causal: bool = True,
) -> jax.Array:
    """Which token may look at which: [R, T, S], query by key; the contract of `attention`.

    A token sees its own segment, up to itself if `causal`, and within it the shared prompt (side 0)
    and its own side. Segment 0 is padding, which nobody sees, and neither does anybody see side 3.
    """
    query_segment, key_segment = segment_ids_RT[:, queries, None], segment_ids_RT[:, None, keys]
    query_side, key_side = sides_RT[:, queries, None], sides_RT[:, None, keys]
    seen = (
        (query_segment == key_segment)
        & (key_segment > 0)
        & ((key_side == 0) | ((key_side == query_side) & (key_side != 3)))
    )
    if causal:
        place = jnp.arange(segment_ids_RT.shape[1])
        seen &= place[queries, None] >= place[keys]
    return seen


def attention(
    q_RTHN: jax.Array,
    k_RTKN: jax.Array,
    v_RTKN: jax.Array,
    segment_ids_RT: jax.Array,
    sides_RT: jax.Array,
    compute: Compute,
    *,
    causal: bool = True,
) -> jax.Array:
    """Scaled dot-product attention within segments, [R, T, H * N]; H may be a multiple of K.

    What padding gets is finite and means nothing. Computed as `compute.attention` says where its
    rules allow, and by XLA where they do not: in training with dropout, without a causal mask
    (splash, pallas), in 32 bits or with an odd length (cudnn).
    """
    R, T, H, N = q_RTHN.shape
    heads = (constrain(x, BATCH_AXES, None, "tp", None) for x in (q_RTHN, k_RTKN, v_RTKN))
    rows = (*heads, segment_ids_RT, sides_RT)
    drop = Dropout(compute.dropout) if compute.dropout else None
    sixteen_bits = q_RTHN.dtype.itemsize == 2
    if drop:
        out = _with_dropout(*rows, causal=causal, drop=drop)
    elif compute.attention == "splash" and causal:
        out = splash(*rows, shared=compute.shared_prompt)
    elif compute.attention == "pallas" and causal:
        out = _flash(*rows)
    elif compute.attention == "cudnn" and sixteen_bits and T % 2 == 0 and N % 8 == 0 and N <= 128:
        # a query that sees nothing sees itself: cuDNN's gradients of others are not always finite
        unreal = (segment_ids_RT == 0) | (sides_RT == 3)
        mask = visible(segment_ids_RT, sides_RT, causal=causal)
        mask |= unreal[..., None] & jnp.eye(T, dtype=bool)
        out = jax.nn.dot_product_attention(*rows[:3], mask=mask[:, None], implementation="cudnn")
    else:
        out = _by_blocks(*rows, causal=causal)
    return by_features(out.reshape(R, T, H * N))


def _by_blocks(q, k, v, segment_ids, sides, *, causal):
    T = q.shape[1]
    size = max(BLOCK, math.ceil(T / MAX_BLOCKS))

    def block(queries: slice) -> jax.Array:
        keys = slice(0, queries.stop if causal else T)

        def attend(q, k, v):
            mask = visible(segment_ids, sides, queries, keys, causal=causal)[:, None]
            return jax.nn.dot_product_attention(q[:, queries], k[:, keys], v[:, keys], mask=mask)

        return (attend if T <= size else jax.checkpoint(attend))(q, k, v)

    starts = range(0, T, size)
    return jnp.concatenate([block(slice(s, min(s + size, T))) for s in starts], axis=1)


def _with_dropout(q, k, v, segment_ids, sides, *, causal, drop):
    R, T, H, N = q.shape
    K = k.shape[2]
    scores = jnp.einsum(
        "rqkgn,rtkn->rkgqt", q.reshape(R, T, K, H // K, N), k, preferred_element_type=jnp.float32
    )
    mask = visible(segment_ids, sides, causal=causal)[:, None, None]
    scores = jnp.where(mask, scores / math.sqrt(N), jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return jnp.einsum("rkgqt,rtkn->rqkgn", weights, v)


def _flash(q, k, v, segment_ids, sides):
    rows, heads = (BATCH_AXES, None), (BATCH_AXES, None, "tp", None)
    of_device = by_device(flash, (heads, heads, heads, rows))
    return of_device(q, k, v, ends(segment_ids, sides))
