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
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from easyaira import mesh
from easyaira.mesh import BATCH_AXES
from easyaira.models.flash import ends, flash
from easyaira.models.layers import Compute, Dropout, by_features

BLOCK = 512  # queries
MAX_BLOCKS = 16  # of a row: they are unrolled in the program
LANES = 128  # of a TPU's vector unit


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
    heads = (mesh.constrain(x, BATCH_AXES, None, "tp", None) for x in (q_RTHN, k_RTKN, v_RTKN))
    rows = (*heads, segment_ids_RT, sides_RT)
    drop = Dropout(compute.dropout) if compute.dropout else None
    sixteen_bits = q_RTHN.dtype.itemsize == 2
    if drop:
        out = _with_dropout(*rows, causal=causal, drop=drop)
    elif compute.attention == "splash" and causal:
        out = _splash(*rows, shared=compute.shared_prompt)
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
    of_device = mesh.by_device(flash, (heads, heads, heads, rows))
    return of_device(q, k, v, ends(segment_ids, sides))


def _splash(q, k, v, segment_ids, sides, *, shared: bool):
    """A kernel that knows causality and that equal ids see each other; `_ids` says the rest by it.

    A kernel is not divided by the compiler: each device computes its rows and heads by itself.
    """
    q_ids, k_ids = _ids(segment_ids, sides, shared)
    if shared:
        k, v = (jnp.concatenate([x, x], axis=1) for x in (k, v))
    compute = partial(_splash_rows, copies=2 if shared else 1)
    rows, heads = (BATCH_AXES, None), (BATCH_AXES, None, "tp", None)
    return mesh.by_device(compute, (heads, heads, heads, rows, rows))(q, k, v, q_ids, k_ids)


def _ids(segment_ids, sides, shared):
    """Ids of queries [R, T] and keys [R, S], equal where `visible` says so but for causality.

    With a shared prompt, keys are there twice: once for the first answer, once for the second, and
    each copy of the prompt is seen from one side. Side 3 is seen by nobody; padding sees padding.
    """
    group = segment_ids * 4
    if not shared:
        return group + jnp.where(sides == 3, 0, sides), group + sides
    chosen = jnp.where(sides <= 1, group + 1, group)  # no query has `group` itself
    rejected = jnp.where(sides % 2 == 0, group + 2, group)
    queries = jnp.where(sides == 2, group + 2, group + 1)
    return queries, jnp.concatenate([chosen, rejected], axis=1)


def _splash_rows(q, k, v, q_ids, k_ids, *, copies: int, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    R, T, H, N = q.shape
    padded = math.ceil(T / LANES) * LANES
    block = next(size for size in (4 * LANES, 2 * LANES, LANES) if padded % size == 0)

    def pad(x, value=0):  # each copy of the keys by itself
        x = x.reshape(R, -1, T, *x.shape[2:])
        room = [(0, 0), (0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, room, constant_values=value)
        return x.reshape(R, -1, *x.shape[3:])

    class Causal(masks.Mask):
        """Of each copy of the keys; looked at block by block and never held."""

        shape = (padded, copies * padded)

        def __getitem__(self, index):
            queries, keys = (np.arange(n)[i] for n, i in zip(self.shape, index, strict=True))
            return queries[:, None] >= keys % padded

        def __hash__(self):
            return hash(self.shape)

    sizes = kernels.BlockSizes(
        **{f"block_{x}": block for x in "q kv kv_compute q_dkv kv_dkv kv_dkv_compute".split()},
        **{f"block_{x}": block for x in ("q_dq", "kv_dq")},
    )
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([Causal()] * H),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    by_head = [jnp.moveaxis(pad(x), 1, 2) for x in (q / math.sqrt(N), k, v)]
    ids = kernels.SegmentIds(pad(q_ids, -1), pad(k_ids, -1))
    out = jax.vmap(kernel)(*by_head, segment_ids=ids)
    return jnp.moveaxis(out, 1, 2)[:, :T].astype(q.dtype)
