"""Log-probabilities of tokens, in float32, without storing the logits of whole rows.

Shapes: R rows, T tokens, D width, V vocabulary. Nothing is reduced, except in `token_nll`: the
caller knows the denominator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain, on_cpu, on_one_cpu, parts_of
from easyaira.losses.chunks import CHUNK_LOGITS, Chunks, Sizes, chunks_of, put, sizes_of, take
from easyaira.models.layers import capped
from easyaira.models.product import (
    NOT_NEGATIVE,
    einsum,
    few_at_a_time,
    packed,
    row_dot,
    unpacked,
)

MANY = 8  # chunks for which transposing the head is worth its time, see `_to_states`

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
    total, values = _nll(*positions, vocab_size, cap, label_smoothing)
    return total, unflatten(values)


# Shapes below: S shards, N positions per shard, C positions per chunk, G chunks per group, F values
# of TokenLogps.


class _Positions(NamedTuple):
    """Hidden states, each with the token that follows it. This is the only shift by one: a token's
    log-probability comes from the hidden state before it."""

    states: jax.Array  # [S, N, D]
    head: jax.Array
    targets: jax.Array  # [S, N]
    wanted: jax.Array  # [S, N]
    sizes: Sizes


def _positions(hidden, head, tokens, loss_mask, chunk_logits):
    rows, length, _ = hidden.shape
    shards = parts_of(rows, BATCH_AXES)
    wanted = jnp.ones_like(tokens, bool) if loss_mask is None else loss_mask

    def flat(x: jax.Array) -> jax.Array:  # [S, N, ...]: no communication
        x = x.reshape(shards, rows // shards * (length - 1), *x.shape[2:])
        return constrain(x, BATCH_AXES, *(None,) * (x.ndim - 1))

    def unflatten(values) -> TokenLogps:
        values = values.reshape(rows, length - 1, len(TokenLogps._fields))
        return TokenLogps(*jnp.moveaxis(jnp.pad(values, ((0, 0), (1, 0), (0, 0))), -1, 0))

    flattened = flat(hidden[:, :-1]), head, flat(tokens[:, 1:]), flat(wanted[:, 1:])
    most = rows // shards * (length - 1)
    sizes = sizes_of(most, head.shape[1], hidden.dtype.itemsize, chunk_logits)
    return _Positions(*flattened, sizes), unflatten


def _kernel(head: jax.Array, dtype: Any) -> jax.Array:
    """Cast the head to [V, D], and gather it over fsdp once instead of for each chunk. A tied head
    is stored in this layout, and XLA's CPU multiplies faster in it."""
    return constrain(head.astype(dtype).T, "tp", None)


def _to_states(head: jax.Array, kernel: jax.Array, chunks: Chunks) -> Callable[..., jax.Array]:
    """Function of a slope [S, C, V] and a dtype: the gradient of the states [S, C, D]."""
    if not on_one_cpu() or chunks.order.shape[1] < MANY * chunks.sizes.chunk:
        return lambda slope, dtype: einsum("scv,vd->scd", slope, kernel, dtype)
    # A CPU multiplies by the head a third faster if it is stored as [D, V]. Without the barrier,
    # XLA would undo the transposition of a tied head; with an axis for S, which is 1, it would
    # transpose the head for each chunk.
    by_column = jax.lax.optimization_barrier(head.astype(kernel.dtype))
    return lambda slope, dtype: einsum("cv,dv->cd", slope[0], by_column, dtype)[None]


def _statistics(index, states, kernel, targets, vocab_size, cap, smoothing):
    """For the chunk of positions `index` [S, C] of states [S, N, D]: the values of TokenLogps [S,
    C, F]; and the gradient of logps with respect to the product of states and head [S, C, V], in
    the dtype of the states."""
    states, targets = take(states, index), take(targets, index)
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
    return jnp.stack([x.reshape(shape) for x in values], -1), slope


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


def _add_groups(chunks, first, one, states_of, carry, d_head, dtype):
    """Run `one(i, carry) -> carry, slope [S, C, V]` for the chunks from group `first` on, and add
    the products of states and slopes, a group at a time, to the head's gradient [S, D, V]."""
    G, C = chunks.sizes.group, chunks.sizes.chunk
    slopes = None
    if G > 1:
        slopes = packed(jnp.zeros((G, d_head.shape[0], C, d_head.shape[-1]), dtype))

    def body(g, state):
        carry, d_head, slopes = state

        def step(j, inner):
            carry, slope = one(g * G + j, inner[0])
            return carry, jax.lax.dynamic_update_index_in_dim(
                inner[1], packed(slope), j, 0, **NOT_NEGATIVE
            )

        if slopes is None:
            carry, slope = one(g, carry)
            of_group = packed(slope)[None]
        else:  # a chunk without loss keeps the slopes of an earlier one: its states are 0
            carry, slopes = jax.lax.fori_loop(0, chunks.of_group(g), step, (carry, slopes))
            of_group = slopes
        return carry, d_head + _of_head(states_of(chunks.index(g * G, G)), of_group), slopes

    return jax.lax.fori_loop(first, chunks.groups, body, (carry, d_head, slopes))[:2]


def _of_head(states, slopes):
    """Gradient of the head [S, D, V], in float32, by the states [S, G x C, D] and packed slopes [G,
    S, C, V] of a group."""
    slopes = jnp.moveaxis(unpacked(slopes, states.dtype), 0, 1)
    slopes = slopes.reshape(*states.shape[:2], -1)
    return einsum("scd,scv->sdv", states, slopes, jnp.float32)


def _reduce_head(d_head, head):
    """Sum the head's gradient over shards, sharded like the head so that no device stores all."""
    return constrain(d_head.sum(0), "fsdp", "tp").astype(head.dtype)


def _no_values(targets):
    return jnp.zeros((*targets.shape, len(TokenLogps._fields)), jnp.float32)


def _zero_gradients(states, head):
    zeros = jnp.zeros((states.shape[0], *head.shape), jnp.float32)
    return jnp.zeros_like(states), constrain(zeros, BATCH_AXES, None, "tp")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _logps(states, head, targets, wanted, sizes, vocab_size, cap, smoothing):
    """The values of TokenLogps, [S, N, F]."""
    return _logps_forward(states, head, targets, wanted, sizes, vocab_size, cap, smoothing)[0]


def _logps_forward(states, head, targets, wanted, sizes, vocab_size, cap, smoothing):
    chunks, kernel = chunks_of(wanted, sizes), _kernel(head, states.dtype)

    def body(i, carry):
        values, kept = carry
        index = chunks.index(i)
        new, slope = _statistics(index, states, kernel, targets, vocab_size, cap, smoothing)
        kept = kept.at[i].set(packed(slope), mode="drop", wrap_negative_indices=False)
        return put(values, index, new), kept

    shape = sizes.kept, states.shape[0], sizes.chunk, head.shape[1]
    kept = packed(jnp.zeros(shape, states.dtype))
    kept = constrain(kept, None, BATCH_AXES, None, "tp")
    values, kept = jax.lax.fori_loop(0, chunks.count, body, (_no_values(targets), kept))
    return values, (states, head, targets, wanted, kept)


def _logps_backward(sizes, vocab_size, cap, smoothing, saved, d_values):
    states, head, targets, wanted, kept = saved
    chunks, kernel = chunks_of(wanted, sizes), _kernel(head, states.dtype)
    scales, to_states, G = d_values[..., :1], _to_states(head, kernel, chunks), sizes.group

    def scaled(index):  # and not the slopes, which are larger
        return (take(states, index) * take(scales, index)).astype(states.dtype)

    def added(d_states, i, slope):
        index = chunks.index(i)
        d_chunk = to_states(slope, jnp.float32) * take(scales, index)
        return put(d_states, index, d_chunk.astype(states.dtype))

    def cached(g, gradients):
        def of_chunk(j, d_states):
            i = g * G + j
            slope = jax.lax.dynamic_index_in_dim(kept, i, keepdims=False, **NOT_NEGATIVE)
            return added(d_states, i, unpacked(slope, states.dtype))

        d_states, d_head = gradients
        d_states = jax.lax.fori_loop(0, chunks.of_group(g), of_chunk, d_states)
        slopes = jax.lax.dynamic_slice_in_dim(kept, g * G, G, **NOT_NEGATIVE)
        return d_states, d_head + _of_head(scaled(chunks.index(g * G, G)), slopes)

    def recomputed(i, d_states):
        index = chunks.index(i)
        _, slope = _statistics(index, states, kernel, targets, vocab_size, cap, smoothing)
        return added(d_states, i, slope), slope

    first = jnp.minimum(chunks.groups, len(kept) // G)
    gradients = jax.lax.fori_loop(0, first, cached, _zero_gradients(states, head))
    d_states, d_head = _add_groups(chunks, first, recomputed, scaled, *gradients, states.dtype)
    return d_states, _reduce_head(d_head, head), None, None


_logps.defvjp(_logps_forward, _logps_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _nll(states, head, targets, wanted, sizes, vocab_size, cap, smoothing):
    """-sum of logps; then the values of TokenLogps, [S, N, F]."""
    values = _logps(states, head, targets, wanted, sizes, vocab_size, cap, smoothing)
    return -values[..., 0].sum(), values


def _nll_forward(states, head, targets, wanted, sizes, vocab_size, cap, smoothing):
    chunks, kernel = chunks_of(wanted, sizes), _kernel(head, states.dtype)
    to_states = _to_states(head, kernel, chunks)

    def one(i, carry):
        values, d_states = carry
        index = chunks.index(i)
        new, slope = _statistics(index, states, kernel, targets, vocab_size, cap, smoothing)
        d_chunk = to_states(slope, states.dtype)
        return (put(values, index, new), put(d_states, index, d_chunk)), slope

    d_states, d_head = _zero_gradients(states, head)
    carry, states_of = (_no_values(targets), d_states), partial(take, states)
    (values, d_states), d_head = _add_groups(chunks, 0, one, states_of, carry, d_head, states.dtype)
    return (-values[..., 0].sum(), values), (d_states, _reduce_head(d_head, head))


def _nll_backward(sizes, vocab_size, cap, smoothing, gradients, cotangents):
    return *(jax.tree.map(lambda g: (g * -cotangents[0]).astype(g.dtype), gradients)), None, None


_nll.defvjp(_nll_forward, _nll_backward)
