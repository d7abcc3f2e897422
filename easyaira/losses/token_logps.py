"""Log-probabilities of tokens, in float32, without storing the logits of whole rows.

Shapes: R rows, T tokens, D width, V vocabulary. Nothing is reduced, except in `token_nll`: the
caller knows the denominator."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain, on_cpu, on_one_cpu, parts_of
from easyaira.models.layers import capped
from easyaira.models.product import einsum, few_at_a_time, packed, row_dot, unpacked

CHUNK_LOGITS = 2**25  # logits that a device stores at a time, 128 MiB
KEPT_BYTES = 16  # for each of these: of logit gradients cached for the backward pass
# Most positions of a chunk on a CPU: its caches hold their logits, and the last chunk has few
# positions without loss. Smaller chunks add to the head's gradient more often than they are worth.
CPU_CHUNK = 256

PerToken = Float[Array, "R T"]


class TokenLogps(NamedTuple):
    """Per-token statistics of the next-token distribution; 0 at a row's first token and where
    `loss_mask` is false. Only `logps` is differentiable, and only from `token_logps`."""

    logps: PerToken
    is_top1: PerToken  # 1 where the token is the most likely one
    mean_logits: PerToken  # mean of the logits over the vocabulary
    entropy: PerToken  # entropy of the token's distribution, in nats
    log_sum_sq_probs: PerToken  # log of the sum of its squared probabilities


def token_logps(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    loss_mask: Bool[Array, "R T"] | None = None,
    *,
    vocab_size: int,
    cap: float | None,
    chunk_logits: int = CHUNK_LOGITS,
) -> TokenLogps:
    """log p(token | the tokens before it in its row), without storing the logits of whole rows.

    Only tokens in `loss_mask` are projected, in a dynamic number of chunks. The logit gradients of
    the first chunks are cached for the backward pass (`kept_chunks`); those of the others are
    recomputed. So small batches cost no more than with full logits, and memory is bounded. Liger's
    linear cross-entropy (Hsu et al., 2024) applies the same idea to one loss.

    Args:
        hidden: final hidden states, in the computing dtype.
        head: float32 weights; columns from `vocab_size` on are padding and have no probability.
        tokens: the token at each position.
        loss_mask: tokens to evaluate; default: all.
        vocab_size: number of real columns (`Model.head_options` has this and the next).
        cap: soft cap of the logits (`layers.capped`); None: none.
        chunk_logits: logits that a device may store at a time.
    """
    positions, unflatten = _positions(hidden, head, tokens, loss_mask, chunk_logits)
    return unflatten(_logps(*positions, vocab_size, cap, 0.0))


def token_nll(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    loss_mask: Bool[Array, "R T"] | None = None,
    *,
    vocab_size: int,
    cap: float | None,
    label_smoothing: float = 0.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Float[Array, ""], TokenLogps]:
    """-sum of log p(token | the tokens before it) over `loss_mask`, and `token_logps`' result.

    The gradient of a sum has the same scale for every token, so the forward pass computes it while
    a chunk's logits are in memory: three products with the head instead of four. Arguments as in
    `token_logps`, and:

    Args:
        label_smoothing: e in (1 - e) log p(token) + e (mean of log p over the vocabulary), which
            replaces log p(token), in `logps`, too: Szegedy et al. (2016), Rethinking the Inception
            Architecture, section 7.
    """
    positions, unflatten = _positions(hidden, head, tokens, loss_mask, chunk_logits)
    total, parts = _nll(*positions, vocab_size, cap, label_smoothing)
    return total, unflatten(parts)


def chunk_size(positions: int, columns: int, chunk_logits: int = CHUNK_LOGITS) -> int:
    """Number of positions that a device projects at a time."""
    most = max(1, min(positions, chunk_logits // columns))
    return min(most, CPU_CHUNK) if on_cpu() else most


def kept_chunks(
    chunk: int, positions: int, columns: int, chunk_logits: int = CHUNK_LOGITS, *, itemsize: int
) -> int:
    """Number of chunks of this size whose logit gradients, of `itemsize` bytes each, are cached for
    the backward pass."""
    most = KEPT_BYTES // itemsize * max(1, chunk_logits // columns) // chunk
    return min(most, -(-positions // chunk))


# Shapes below: S shards, N positions per shard, C positions per chunk.


class _Sizes(NamedTuple):
    chunk: int
    kept: int


class _Positions(NamedTuple):
    """Hidden states, each with the token that follows it. This is the only shift by one: a token's
    log-probability comes from the hidden state before it."""

    states: jax.Array  # [S, N, D]
    head: jax.Array
    targets: jax.Array  # [S, N]
    wanted: jax.Array  # [S, N]
    sizes: _Sizes


def _positions(hidden, head, tokens, loss_mask, chunk_logits):
    rows, length, _ = hidden.shape
    shards = parts_of(rows, BATCH_AXES)
    wanted = jnp.ones_like(tokens, bool) if loss_mask is None else loss_mask

    def flat(x: jax.Array) -> jax.Array:  # [S, N, ...]: no communication
        x = x.reshape(shards, rows // shards * (length - 1), *x.shape[2:])
        return constrain(x, BATCH_AXES, *(None,) * (x.ndim - 1))

    def unflatten(parts) -> TokenLogps:
        parts = (part.reshape(rows, length - 1) for part in parts)
        return TokenLogps(*(jnp.pad(part, ((0, 0), (1, 0))) for part in parts))

    most = rows // shards * (length - 1), head.shape[1], chunk_logits
    chunk = chunk_size(*most)
    flattened = flat(hidden[:, :-1]), head, flat(tokens[:, 1:]), flat(wanted[:, 1:])
    kept = kept_chunks(chunk, *most, itemsize=hidden.dtype.itemsize)
    return _Positions(*flattened, _Sizes(chunk, kept)), unflatten


class _Chunks(NamedTuple):
    """The order of positions for chunking: positions with loss first, then out-of-range indices."""

    order: jax.Array  # [S, multiple of `size`]; unique, and N or more where there is no position
    count: jax.Array  # chunks that have a position with loss, on any shard
    size: int

    def index(self, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(self.order, i * self.size, self.size, axis=1)


def _chunks(wanted: jax.Array, size: int) -> _Chunks:
    wanted = jnp.pad(wanted, ((0, 0), (0, -wanted.shape[1] % size)))
    place = jnp.arange(wanted.shape[1], dtype=jnp.int32)
    order = jnp.sort(jnp.where(wanted, place, len(place) + place), axis=1)
    count = (wanted.sum(1).max() + size - 1) // size
    return _Chunks(order, count, size)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gather x[s, index[s, c]], with zero where the index is out of range."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)


def _put(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Scatter `values` into x. Indices are unique, so the result is deterministic."""

    def put(row, at, new):
        return row.at[at].set(new, mode="drop", unique_indices=True)

    return jax.vmap(put)(x, index, values)


def _kernel(head: jax.Array, dtype: Any) -> jax.Array:
    """Cast the head to [V, D], and gather it over fsdp once instead of for each chunk. A tied head
    is stored in this layout, and XLA's CPU multiplies faster in it."""
    return constrain(head.astype(dtype).T, "tp", None)


def _token_statistics(states, kernel, targets, vocab_size, cap, smoothing):
    """For a chunk: the values of TokenLogps [S, C]; and the gradient of logps with respect to the
    product of states and head [S, C, V], in the dtype of the states."""
    shape, columns = targets.shape, kernel.shape[0]
    # one axis for shards and positions: along an axis of size 1, XLA's sum of a product takes ten
    # times as long on a CPU
    states, targets = states.reshape(-1, states.shape[-1]), targets.reshape(-1, 1)
    logits = capped(einsum("nd,vd->nv", states, kernel, jnp.float32), cap)

    def of_logits(logits, targets):
        values, slope = _of_logits(logits, targets, vocab_size, cap, smoothing)
        return values, slope.astype(states.dtype)

    values, slope = few_at_a_time(of_logits, (logits, targets), 4 * columns)
    slope = unpacked(slope, states.dtype).reshape(*shape, columns)
    return tuple(x.reshape(shape) for x in values), slope


def _of_logits(logits, targets, vocab_size, cap, smoothing):
    """The values of TokenLogps [N] and the gradient [N, V], as above, of logits [N, V]."""
    columns = jnp.arange(logits.shape[1])
    real = columns < vocab_size
    mean = row_dot(logits, real) / vocab_size
    bent = 1 if cap is None else 1 - (logits / cap) ** 2  # tanh' = 1 - tanh^2
    is_target = columns == targets
    if on_one_cpu():
        target = jnp.take_along_axis(logits, targets, 1)[:, 0]
    else:  # stays local when the vocabulary is sharded
        target = jnp.where(is_target, logits, 0).sum(-1)
    # an array is masked once, where it is written: a CPU would store a copy for each sum
    largest = (logits + jnp.where(real, 0, -jnp.inf)).max(-1)
    exps = jnp.exp(jnp.where(real, logits - largest[:, None], -jnp.inf))
    if on_cpu():  # XLA would compute them again for each use
        exps = jax.lax.optimization_barrier(exps)
    total = row_dot(exps, jnp.ones(len(columns)))
    expected = row_dot(exps, logits) / total
    lse = largest + jnp.log(total)
    logps, labels = target - lse, jnp.where(is_target, 1.0, 0.0)
    if smoothing:
        logps = (1 - smoothing) * target + smoothing * mean - lse
        labels = (1 - smoothing) * labels + smoothing / vocab_size * real
    squares = jnp.log(row_dot(exps, exps)) - 2 * jnp.log(total)
    values = (logps, (target >= largest) * 1.0, mean, lse - expected, squares)
    return values, (labels - exps / total[:, None]) * bent


def _gradients(states, kernel, slope, scale=None):
    """Gradients of a chunk's states [S, C, D], in their dtype, and of the head [S, D, V], in
    float32, each position's times its `scale` [S, C]. The states are scaled, since the slope
    [S, C, V] is larger."""
    dtype = states.dtype
    if scale is None:
        d_states = einsum("scv,vd->scd", slope, kernel, dtype)
    else:
        d_states = einsum("scv,vd->scd", slope, kernel, jnp.float32) * scale[..., None]
        states = (states * scale[..., None]).astype(dtype)
    return d_states.astype(dtype), einsum("scd,scv->sdv", states, slope, jnp.float32)


def _reduce_head(d_head, head):
    """Sum the head's gradient over shards, sharded like the head so that no device stores all."""
    return constrain(d_head.sum(0), "fsdp", "tp").astype(head.dtype)


def _zero_gradients(states, head):
    zeros = jnp.zeros((states.shape[0], *head.shape), jnp.float32)
    return jnp.zeros_like(states), constrain(zeros, BATCH_AXES, None, "tp")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _logps(states, head, targets, wanted, sizes, vocab_size, cap, smoothing):
    """The values of TokenLogps, [S, N] each."""
    return _logps_forward(states, head, targets, wanted, sizes, vocab_size, cap, smoothing)[0]


def _logps_forward(states, head, targets, wanted, sizes, vocab_size, cap, smoothing):
    chunks, kernel = _chunks(wanted, sizes.chunk), _kernel(head, states.dtype)

    def body(i, carry):
        parts, kept = carry
        index = chunks.index(i)
        values, slope = _token_statistics(
            _take(states, index), kernel, _take(targets, index), vocab_size, cap, smoothing
        )
        parts = tuple(_put(part, index, new) for part, new in zip(parts, values, strict=True))
        return parts, kept.at[i].set(packed(slope), mode="drop")

    zeros = (jnp.zeros(targets.shape, jnp.float32),) * len(TokenLogps._fields)
    shape = sizes.kept, states.shape[0], sizes.chunk, head.shape[1]
    kept = packed(jnp.zeros(shape, states.dtype))
    kept = constrain(kept, None, BATCH_AXES, None, "tp")
    parts, kept = jax.lax.fori_loop(0, chunks.count, body, (zeros, kept))
    return parts, (states, head, targets, wanted, kept)


def _logps_backward(sizes, vocab_size, cap, smoothing, saved, cotangents):
    states, head, targets, wanted, kept = saved
    chunks, kernel = _chunks(wanted, sizes.chunk), _kernel(head, states.dtype)

    def recompute(chunk_states, index):
        _, slope = _token_statistics(
            chunk_states, kernel, _take(targets, index), vocab_size, cap, smoothing
        )
        return slope

    def body(i, gradients, slope_of):
        d_states, d_head = gradients
        index = chunks.index(i)
        chunk_states = _take(states, index)
        scale = _take(cotangents[0], index)
        slope = slope_of(i, chunk_states, index)
        d_chunk, d_kernel = _gradients(chunk_states, kernel, slope, scale)
        return _put(d_states, index, d_chunk), d_head + d_kernel

    cached = partial(body, slope_of=lambda i, *_: unpacked(kept[i], states.dtype))
    recomputed = partial(
        body, slope_of=lambda i, chunk_states, index: recompute(chunk_states, index)
    )
    first = jnp.minimum(chunks.count, len(kept))
    gradients = jax.lax.fori_loop(0, first, cached, _zero_gradients(states, head))
    d_states, d_head = jax.lax.fori_loop(first, chunks.count, recomputed, gradients)
    return d_states, _reduce_head(d_head, head), None, None


_logps.defvjp(_logps_forward, _logps_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _nll(states, head, targets, wanted, sizes, vocab_size, cap, smoothing):
    """-sum of logps; then the values of TokenLogps, [S, N] each."""
    parts = _logps(states, head, targets, wanted, sizes, vocab_size, cap, smoothing)
    return -parts[0].sum(), parts


def _nll_forward(states, head, targets, wanted, sizes, vocab_size, cap, smoothing):
    chunks, kernel = _chunks(wanted, sizes.chunk), _kernel(head, states.dtype)

    def body(i, carry):
        parts, (d_states, d_head) = carry
        index = chunks.index(i)
        chunk_states = _take(states, index)
        values, slope = _token_statistics(
            chunk_states, kernel, _take(targets, index), vocab_size, cap, smoothing
        )
        d_chunk, d_kernel = _gradients(chunk_states, kernel, slope)
        parts = tuple(_put(part, index, new) for part, new in zip(parts, values, strict=True))
        return parts, (_put(d_states, index, d_chunk), d_head + d_kernel)

    zeros = (jnp.zeros(targets.shape, jnp.float32),) * len(TokenLogps._fields)
    start = zeros, _zero_gradients(states, head)
    parts, (d_states, d_head) = jax.lax.fori_loop(0, chunks.count, body, start)
    return (-parts[0].sum(), parts), (d_states, _reduce_head(d_head, head))


def _nll_backward(sizes, vocab_size, cap, smoothing, gradients, cotangents):
    return *(jax.tree.map(lambda g: (g * -cotangents[0]).astype(g.dtype), gradients)), None, None


_nll.defvjp(_nll_forward, _nll_backward)
