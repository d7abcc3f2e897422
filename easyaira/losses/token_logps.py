"""Log-probabilities of tokens, in float32, without logits of whole rows.

Shapes: R rows, T tokens, D width, V vocabulary. Nothing is reduced here: the caller knows the
denominator."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain, parts_of

CHUNK_LOGITS = 2**25  # logits that a device holds at a time, 128 MiB
KEPT_CHUNKS = 4  # of which the backward pass need not compute the logits again

PerToken = Float[Array, "R T"]


class TokenLogps(NamedTuple):
    """What the head says about each token, given the ones before it. 0 at the first of a row, and
    where no loss was asked for. Only `logps` has a gradient, and none of them in `token_nll`."""

    logps: PerToken
    is_top1: PerToken  # 1 where the token is the likeliest one
    mean_logits: PerToken  # logits averaged over the vocabulary
    entropy: PerToken  # of the distribution that the token was drawn from, in nats


def token_logps(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    loss_mask: Bool[Array, "R T"] | None = None,
    *,
    vocab_size: int,
    chunk_logits: int = CHUNK_LOGITS,
) -> TokenLogps:
    """log p(token | the tokens before it in its row), without holding logits for whole rows.

    Only tokens in `loss_mask` are projected. They are gone through in chunks, as many as there
    happen to be. What the backward pass needs of logits is kept of the first KEPT_CHUNKS, and
    computed again of all others, so that small batches cost no more than full logits and memory is
    bounded. Liger's linear cross-entropy (Hsu et al., 2024) is the same idea for one loss.

    Args:
        hidden: final hidden states, in the computing dtype.
        head: float32 weights; columns from `vocab_size` on are padding and get no probability.
        tokens: the tokens whose log-probabilities are wanted.
        loss_mask: where they are wanted; everywhere by default.
        vocab_size: number of real columns.
        chunk_logits: how many logits a device may hold at a time.
    """
    positions, unflatten = _positions(hidden, head, tokens, loss_mask, chunk_logits)
    return unflatten(_logps(*positions, vocab_size))


def token_nll(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    loss_mask: Bool[Array, "R T"] | None = None,
    *,
    vocab_size: int,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Float[Array, ""], TokenLogps]:
    """-sum of log p(token | the tokens before it) over `loss_mask`, and what `token_logps` says.

    A sum's gradient is the same for every token, and is computed while a chunk's logits are there:
    three products with the head instead of four. Arguments as in `token_logps`.
    """
    positions, unflatten = _positions(hidden, head, tokens, loss_mask, chunk_logits)
    total, parts = _nll(*positions, vocab_size)
    return total, unflatten(parts)


# Shapes below: S shards, N positions of a shard, C positions of a chunk.


class _Positions(NamedTuple):
    """Hidden states, and the token that follows each. This is the one place that shifts: the entry
    of a token comes from the hidden state before it."""

    states: jax.Array  # [S, N, D]
    head: jax.Array
    targets: jax.Array  # [S, N]
    wanted: jax.Array  # [S, N]
    chunk: int


def _positions(hidden, head, tokens, loss_mask, chunk_logits):
    rows, length, _ = hidden.shape
    shards = parts_of(rows, BATCH_AXES)
    wanted = jnp.ones_like(tokens, bool) if loss_mask is None else loss_mask

    def flat(x: jax.Array) -> jax.Array:  # [S, N, ...]: what a device holds stays there
        x = x.reshape(shards, rows // shards * (length - 1), *x.shape[2:])
        return constrain(x, BATCH_AXES, *(None,) * (x.ndim - 1))

    def unflatten(parts) -> TokenLogps:
        parts = (part.reshape(rows, length - 1) for part in parts)
        return TokenLogps(*(jnp.pad(part, ((0, 0), (1, 0))) for part in parts))

    chunk = chunk_size(rows // shards * (length - 1), head.shape[1], chunk_logits)
    flattened = flat(hidden[:, :-1]), head, flat(tokens[:, 1:]), flat(wanted[:, 1:])
    return _Positions(*flattened, chunk), unflatten


def chunk_size(positions: int, columns: int, chunk_logits: int = CHUNK_LOGITS) -> int:
    """How many of a device's positions are projected at a time."""
    return max(1, min(positions, chunk_logits // columns))


class _Chunks(NamedTuple):
    """The order in which positions are gone through: those with loss first, then nothing."""

    order: jax.Array  # [S, whole chunks]; beyond N where there is no position; no number twice
    count: jax.Array  # how many chunks have a position with loss, on any shard
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
    """x[s, index[s, c]], zero where the index is beyond x."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)


def _put(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """x with `values` at places that are all different, so in whatever order they are written."""

    def put(row, at, new):
        return row.at[at].set(new, mode="drop", unique_indices=True)

    return jax.vmap(put)(x, index, values)


def _kernel(head: jax.Array, dtype: Any) -> jax.Array:
    """The head as it is multiplied: gathered once, and not for each chunk."""
    return constrain(head.astype(dtype), None, "tp")


def _look(states, kernel, targets, vocab_size):
    """Of the positions of a chunk: logps, is_top1, mean_logits and entropy [S, C]; and d logps /
    d logits [S, C, V]."""
    columns = jnp.arange(kernel.shape[1])
    real = columns < vocab_size
    logits = jnp.einsum("scd,dv->scv", states, kernel, preferred_element_type=jnp.float32)
    mean = jnp.where(real, logits, 0).sum(-1) / vocab_size
    logits = jnp.where(real, logits, -jnp.inf)
    # a sum over a mask and not an index: it stays local when the vocabulary is divided
    is_target = columns == targets[..., None]
    target = jnp.where(is_target, logits, 0).sum(-1)
    largest = logits.max(-1)
    exps = jnp.exp(logits - largest[..., None])
    total = exps.sum(-1)
    expected = (exps * jnp.where(real, logits, 0)).sum(-1) / total
    lse = largest + jnp.log(total)
    values = (target - lse, (target >= largest) * 1.0, mean, lse - expected)
    return values, is_target - exps / total[..., None]


def _gradients(states, kernel, d_logits):
    """Of a chunk's states [S, C, D], in their dtype, and of the head [S, D, V], in float32."""
    d_logits = d_logits.astype(states.dtype)
    d_states = jnp.einsum("scv,dv->scd", d_logits, kernel).astype(states.dtype)
    d_head = jnp.einsum("scd,scv->sdv", states, d_logits, preferred_element_type=jnp.float32)
    return d_states, d_head


def _of_head(d_head, head):
    """All shards' parts of the head's gradient; divided as the head is, so that none holds all."""
    return constrain(d_head.sum(0), "fsdp", "tp").astype(head.dtype)


def _zero_gradients(states, head):
    zeros = jnp.zeros((states.shape[0], *head.shape), jnp.float32)
    return jnp.zeros_like(states), constrain(zeros, BATCH_AXES, None, "tp")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _logps(states, head, targets, wanted, chunk, vocab_size):
    """logps, is_top1, mean_logits and entropy, [S, N] each."""
    return _logps_forward(states, head, targets, wanted, chunk, vocab_size)[0]


def _logps_forward(states, head, targets, wanted, chunk, vocab_size):
    chunks, kernel = _chunks(wanted, chunk), _kernel(head, states.dtype)

    def body(i, carry):
        parts, kept = carry
        index = chunks.index(i)
        values, slope = _look(_take(states, index), kernel, _take(targets, index), vocab_size)
        parts = tuple(_put(part, index, new) for part, new in zip(parts, values, strict=True))
        return parts, kept.at[i].set(slope.astype(kept.dtype), mode="drop")

    zeros = (jnp.zeros(targets.shape, jnp.float32),) * 4
    count = min(KEPT_CHUNKS, chunks.order.shape[1] // chunk)
    kept = jnp.zeros((count, states.shape[0], chunk, head.shape[1]), states.dtype)
    kept = constrain(kept, None, BATCH_AXES, None, "tp")
    parts, kept = jax.lax.fori_loop(0, chunks.count, body, (zeros, kept))
    return parts, (states, head, targets, wanted, kept)


def _logps_backward(chunk, vocab_size, saved, cotangents):
    states, head, targets, wanted, kept = saved
    chunks, kernel = _chunks(wanted, chunk), _kernel(head, states.dtype)

    def again(some, index):
        _, slope = _look(some, kernel, _take(targets, index), vocab_size)
        return slope.astype(kept.dtype)

    def body(i, gradients, slope_of):
        d_states, d_head = gradients
        index = chunks.index(i)
        some = _take(states, index)
        scale = _take(cotangents[0], index)[..., None]
        d_some, more = _gradients(some, kernel, slope_of(i, some, index) * scale)
        return _put(d_states, index, d_some), d_head + more

    of_kept = partial(body, slope_of=lambda i, some, index: kept[i])
    of_others = partial(body, slope_of=lambda i, some, index: again(some, index))
    first = jnp.minimum(chunks.count, len(kept))
    gradients = jax.lax.fori_loop(0, first, of_kept, _zero_gradients(states, head))
    d_states, d_head = jax.lax.fori_loop(first, chunks.count, of_others, gradients)
    return d_states, _of_head(d_head, head), None, None


_logps.defvjp(_logps_forward, _logps_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _nll(states, head, targets, wanted, chunk, vocab_size):
    """-sum of logps; and logps, is_top1, mean_logits and entropy, [S, N] each."""
    parts = _logps(states, head, targets, wanted, chunk, vocab_size)
    return -parts[0].sum(), parts


def _nll_forward(states, head, targets, wanted, chunk, vocab_size):
    chunks, kernel = _chunks(wanted, chunk), _kernel(head, states.dtype)

    def body(i, carry):
        parts, (d_states, d_head) = carry
        index = chunks.index(i)
        some = _take(states, index)
        values, slope = _look(some, kernel, _take(targets, index), vocab_size)
        d_some, more = _gradients(some, kernel, -slope)
        parts = tuple(_put(part, index, new) for part, new in zip(parts, values, strict=True))
        return parts, (_put(d_states, index, d_some), d_head + more)

    zeros = (jnp.zeros(targets.shape, jnp.float32),) * 4
    start = zeros, _zero_gradients(states, head)
    parts, (d_states, d_head) = jax.lax.fori_loop(0, chunks.count, body, start)
    return (-parts[0].sum(), parts), (d_states, _of_head(d_head, head))


def _nll_backward(chunk, vocab_size, gradients, cotangents):
    return *(jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)), None, None


_nll.defvjp(_nll_forward, _nll_backward)
