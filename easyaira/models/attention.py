"""Attention within the rows of a batch: one function, one mask (`visible`), five implementations.
Shapes: see layers.py; S keys.

- `xla`: any device. A longer row is split into blocks of queries, each with the keys up to its end.
  The backward pass recomputes the scores of a block, so memory is linear in the length.
- `tiles`: flash attention for CPUs, in loops that skip masked tiles; see tiles.py.
- `cudnn`: cuDNN's flash attention on NVIDIA GPUs, in 16 bits, with a dense mask.
- `pallas`: EasyAira's flash attention for GPUs, with one integer per key as the mask; see flash.py.
- `splash`: JAX's Pallas kernel for TPUs, which masks by segment and skips fully masked blocks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import by_device, constrain
from easyaira.models.cache import MASKED, Cache, attend
from easyaira.models.flash import ends, flash
from easyaira.models.layers import Compute, Dropout, Scores, by_features
from easyaira.models.layout import UNATTENDED, sees
from easyaira.models.product import einsum, row_dot
from easyaira.models.splash import splash
from easyaira.models.tiles import attention_by_tiles

BLOCK, LONG_BLOCK = 128, 512  # queries, see `block_of`
MAX_BLOCKS = 16  # per row: blocks are unrolled in the program
DOT_PRODUCT = Scores()


class Near(NamedTuple):
    """Distances between the tokens of a text, and the window that limits them.

    Positions and not places in the row, since the second answer to a shared prompt lies behind the
    first one.
    """

    positions: jax.Array  # [R, T], of each token in its text
    window: jax.Array | int | None = None  # 1: a token sees only itself

    def distance(self, queries: slice, keys: slice) -> jax.Array:
        """How many tokens each key is behind each query, [R, T, S]."""
        return self.positions[:, queries, None] - self.positions[:, None, keys]


def visible(
    segment_ids_RT: jax.Array,
    sides_RT: jax.Array,
    queries: slice = slice(None),
    keys: slice = slice(None),
    *,
    causal: bool = True,
    near: Near | None = None,
) -> jax.Array:
    """The attention mask [R, T, S], query by key; every implementation must agree with it.

    A token attends to keys of its own segment that have side 0 (the shared prompt) or its own side,
    and if `causal` only to keys up to itself. No token attends to padding (segment 0), to
    unattended keys, nor to keys as far behind it as `near.window` or farther.
    """
    query_segment, key_segment = segment_ids_RT[:, queries, None], segment_ids_RT[:, None, keys]
    query_side, key_side = sides_RT[:, queries, None], sides_RT[:, None, keys]
    mask = sees(query_segment, key_segment, query_side, key_side)
    if causal:
        place = jnp.arange(segment_ids_RT.shape[1])
        mask &= place[queries, None] >= place[keys]
    if near is not None and near.window is not None:
        mask &= near.distance(queries, keys) < near.window
    return mask


def attention(
    q_RTHN: jax.Array,
    k_RTKN: jax.Array,
    v_RTKN: jax.Array,
    segment_ids_RT: jax.Array,
    sides_RT: jax.Array,
    compute: Compute,
    *,
    causal: bool = True,
    scores: Scores = DOT_PRODUCT,
    near: Near | None = None,
) -> jax.Array:
    """Scaled dot-product attention within segments, [R, T, H * N]; H may be a multiple of K.

    The output at padding is finite and meaningless. `compute.attention` selects the implementation.
    XLA replaces it where it is unsupported: with dropout or biases; for all but tiles, with other
    scores or a window; without a causal mask (splash, pallas), in 32 bits, with an odd length or
    other head widths (cudnn). It also replaces tiles in rows of at most BLOCK tokens, where one
    product is faster.

    With `compute.cached`, keys and values are cached. Rows of one new token then have the row's
    length in `segment_ids`, and the cache's clock in `sides`; see cache.py.
    """
    R, T, H, N = q_RTHN.shape
    if compute.cached and (kept := Cache()(k_RTKN, v_RTKN, sides_RT[0, 0])):
        window = None if near is None else near.window
        out = attend(q_RTHN, kept, segment_ids_RT[:, 0], sides_RT[0, 0], scores, window)
        return by_features(out.reshape(R, T, H * N))
    heads = (constrain(x, BATCH_AXES, None, "tp", None) for x in (q_RTHN, k_RTKN, v_RTKN))
    rows = (*heads, segment_ids_RT, sides_RT)
    drop = Dropout(compute.dropout) if compute.dropout else None
    plain = scores == DOT_PRODUCT and (near is None or near.window is None)
    how = compute.attention if plain and not drop else "xla"
    sixteen_bits = q_RTHN.dtype.itemsize == 2
    if compute.attention == "tiles" and T > BLOCK and not (drop or scores.slopes):
        out = _by_tiles(*rows, causal=causal, scores=scores, near=near)
    elif how == "splash" and causal:
        out = splash(*rows, answers=compute.shared_prompt)
    elif how == "pallas" and causal:
        out = _flash(*rows)
    elif how == "cudnn" and sixteen_bits and T % 2 == 0 and N % 8 == 0 and N <= 128:
        # masked queries attend to themselves: cuDNN's gradients may not be finite without any key
        unreal = (segment_ids_RT == 0) | (sides_RT == UNATTENDED)
        mask = visible(segment_ids_RT, sides_RT, causal=causal)
        mask |= unreal[..., None] & jnp.eye(T, dtype=bool)
        out = jax.nn.dot_product_attention(*rows[:3], mask=mask[:, None], implementation="cudnn")
    else:
        out = _by_blocks(*rows, causal=causal, drop=drop, scores=scores, near=near)
    return by_features(out.reshape(R, T, H * N))


def implementation_for(mesh: jax.sharding.Mesh | None) -> str:
    """The implementation for a model that is not trained: tiles on CPUs, else XLA's. Training
    checks the kernels of accelerators before each run, see train/kernel_check.py."""
    on_cpus = mesh is not None and mesh.devices.flat[0].platform == "cpu"
    return "tiles" if on_cpus else "xla"


def block_of(length: int, causal: bool = True) -> int:
    """Queries in a block of a row of this length.

    Four blocks compute 5/8 of the scores if `causal`. More compute fewer, in more operations. The
    scores of a block are in memory at once, so a block has at most LONG_BLOCK queries where
    MAX_BLOCKS allow it.
    """
    smallest = max(BLOCK, min(LONG_BLOCK, math.ceil(length / 4))) if causal else LONG_BLOCK
    return max(smallest, math.ceil(length / MAX_BLOCKS))


def _by_blocks(q, k, v, segment_ids, sides, *, causal, drop, scores, near):
    R, T, H, N = q.shape
    K = k.shape[2]
    q = q.reshape(R, T, K, H // K, N)
    size = T if drop else block_of(T, causal)

    def block(queries: slice) -> jax.Array:
        keys = slice(0, queries.stop if causal else T)
        kept = drop(jnp.ones((R, K, H // K, T, T))) if drop else None

        def attend(q, k, v):
            mask = visible(segment_ids, sides, queries, keys, causal=causal, near=near)
            distance = near.distance(queries, keys) if scores.slopes else None
            return _attend(q[:, queries], k[:, keys], v[:, keys], mask, kept, distance, scores)

        return (attend if T <= size else jax.checkpoint(attend))(q, k, v)

    starts = range(0, T, size)
    return jnp.concatenate([block(slice(s, min(s + size, T))) for s in starts], axis=1)


# G query heads share a key/value head


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_RTKGN, k_RSKN, v_RSKN, mask_RTS, kept, distance_RTS, scores):
    """Attention of Vaswani et al. (2017), eq. 1. `kept` [R, K, G, T, S] scales the weights
    (dropout); None: 1.

    The backward pass stores the weights in the computing dtype, and nothing else of their size; it
    computes scores with a soft cap again. The softmax's gradient is that of Dao et al. (2022),
    FlashAttention, appendix B.2: the sum over keys of weight x gradient equals output x gradient.
    """
    return _attend_forward(q_RTKGN, k_RSKN, v_RSKN, mask_RTS, kept, distance_RTS, scores)[0]


def _attend_forward(q, k, v, mask, kept, distance, scores):
    visible_scores = jnp.where(mask[:, None, None], _scores(q, k, scores, distance), MASKED)
    weights = jax.nn.softmax(visible_scores, axis=-1).astype(v.dtype)
    used = weights if kept is None else (weights * kept).astype(v.dtype)
    out = einsum("rkgqt,rtkn->rqkgn", used, v, v.dtype)
    return out, (q, k, v, kept, weights, out)


def _scores(q, k, scores, distance=None):
    distance = None if distance is None else distance[:, None, None]
    return scores.of(einsum("rqkgn,rtkn->rkgqt", q, k, jnp.float32), q.shape[-1], distance)


def _attend_backward(scores, saved, d_out):
    q, k, v, kept, weights, out = saved
    used = weights if kept is None else (weights * kept).astype(v.dtype)
    d_v = einsum("rkgqt,rqkgn->rtkn", used, d_out, v.dtype)
    d_weights = einsum("rqkgn,rtkn->rkgqt", d_out, v, jnp.float32)
    if kept is not None:
        d_weights *= kept
    delta = row_dot(d_out, out).transpose(0, 2, 3, 1)[..., None]
    d_products = weights * (d_weights - delta) / (scores.divisor or math.sqrt(q.shape[-1]))
    if scores.cap is not None:
        capped = _scores(q, k, scores._replace(slopes=None))
        d_products *= 1 - (capped / scores.cap) ** 2  # tanh' = 1 - tanh^2
    d_products = d_products.astype(q.dtype)
    d_q = einsum("rkgqt,rtkn->rqkgn", d_products, k, q.dtype)
    d_k = einsum("rkgqt,rqkgn->rtkn", d_products, q, k.dtype)
    return d_q, d_k, d_v, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _flash(q, k, v, segment_ids, sides):
    rows, heads = (BATCH_AXES, None), (BATCH_AXES, None, "tp", None)
    per_device = by_device(flash, (heads, heads, heads, rows))
    return per_device(q, k, v, ends(segment_ids, sides))


def _by_tiles(q, k, v, segment_ids, sides, *, causal, scores, near):
    rows, heads = (BATCH_AXES, None), (BATCH_AXES, None, "tp", None)
    arrays, axes = [q, k, v, segment_ids, sides], [heads, heads, heads, rows, rows]
    if near is not None and near.window is not None:
        arrays += [near.positions, jnp.asarray(near.window)]
        axes += [rows, ()]
    return by_device(partial(attention_by_tiles, scores=scores, causal=causal), axes)(*arrays)
