"""The splash attention kernel (TPU). Shapes: see layers.py; S keys."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import by_device
from easyaira.models.layout import UNATTENDED

LANES = 128  # width of a TPU's vector unit
GROUP = 1024  # ids per segment, more than it has answers


def splash(q, k, v, segment_ids, sides, *, answers: int):
    """Attention by the splash kernel, whose mask is causality and equal ids of query and key.
    `_ids` expresses `visible` in these ids.

    Args:
        answers: most answers that follow a shared prompt; 0: prompts are not shared.

    The compiler cannot partition a kernel, so each device computes its own rows and heads.
    """
    q_ids, k_ids = _ids(segment_ids, sides, answers)
    copies = max(answers, 1)
    if copies > 1:
        k, v = (jnp.concatenate([x] * copies, axis=1) for x in (k, v))
    compute = partial(_splash_rows, copies=copies)
    rows, heads = (BATCH_AXES, None), (BATCH_AXES, None, "tp", None)
    return by_device(compute, (heads, heads, heads, rows, rows))(q, k, v, q_ids, k_ids)


def _ids(segment_ids, sides, answers):
    """Ids of queries [R, T] and keys [R, S], equal where `visible(causal=False)` is true.

    With a shared prompt, the keys are stored once for each answer. A prompt's queries have the id
    of the first one. No query attends to unattended keys; padding attends to padding.
    """
    group = segment_ids * GROUP
    unseen = sides == UNATTENDED
    queries = group + jnp.maximum(sides, min(answers, 1))
    nothing = group + GROUP - 1  # no query has this id
    if not answers:
        return queries, jnp.where(unseen, nothing, group + sides)
    copies = [
        jnp.where((sides == 0) | (sides == side), group + side, nothing)
        for side in range(1, answers + 1)
    ]
    return queries, jnp.concatenate(copies, axis=1)


def _splash_rows(q, k, v, q_ids, k_ids, *, copies: int, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    R, T, H, N = q.shape
    padded = math.ceil(T / LANES) * LANES
    block = next(size for size in (4 * LANES, 2 * LANES, LANES) if padded % size == 0)

    def pad(x, value=0):  # each copy of the keys separately
        x = x.reshape(R, -1, T, *x.shape[2:])
        room = [(0, 0), (0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, room, constant_values=value)
        return x.reshape(R, -1, *x.shape[3:])

    class Causal(masks.Mask):
        """Causal mask for each copy of the keys, evaluated block by block and never stored."""

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
