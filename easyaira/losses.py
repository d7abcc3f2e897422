"""Log-probabilities of tokens, and the preference losses: functions of arrays, in float32.

Shapes: R rows, T tokens, D width, V vocabulary, B pairs. No loss is reduced here: the caller knows
the denominator. To add a preference loss: one function, and one line in PREFERENCE_LOSSES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK_LOGITS = 2**26  # logits that are held at a time, 256 MiB

PerToken = Float[Array, "R T"]
PerPair = Float[Array, "B"]


class TokenLogps(NamedTuple):
    """What the head says about each token, given the ones before it; 0 at the first of a row."""

    logps: PerToken
    is_top1: PerToken  # 1 where the token is the likeliest one
    mean_logits: PerToken  # logits averaged over the vocabulary


def token_logps(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    *,
    vocab_size: int,
    chunk_logits: int = CHUNK_LOGITS,
) -> TokenLogps:
    """log p(token | the tokens before it in its row), without holding logits for whole rows.

    This is the one place that shifts: the entry of a token comes from the hidden state before it.
    Rows are gone through in chunks of columns whose logits are computed again in the backward pass.

    Args:
        hidden: final hidden states, in the computing dtype.
        head: float32 weights; columns from `vocab_size` on are padding and get no probability.
        tokens: the tokens whose log-probabilities are wanted.
        vocab_size: number of real columns.
        chunk_logits: how many logits may be held at a time.
    """
    rows, length, width = hidden.shape
    columns = head.shape[1]
    real = jnp.arange(columns) < vocab_size

    def of_chunk(chunk):
        states, targets = chunk
        logits = jnp.einsum(
            "rtd,dv->rtv", states, head.astype(states.dtype), preferred_element_type=jnp.float32
        )
        total = jax.lax.stop_gradient(jnp.where(real, logits, 0).sum(-1))
        logits = jnp.where(real, logits, -jnp.inf)
        # a sum over a mask and not an index: it stays local when the vocabulary is divided
        target = jnp.where(jnp.arange(columns) == targets[..., None], logits, 0).sum(-1)
        top1 = target >= jax.lax.stop_gradient(logits.max(-1))
        logps = target - jax.nn.logsumexp(logits, axis=-1)
        return logps, top1.astype(jnp.float32), total / vocab_size

    chunk = max(1, min(length - 1, chunk_logits // (rows * columns)))
    count = -(-(length - 1) // chunk)
    padding = count * chunk - (length - 1)
    states = jnp.pad(hidden[:, :-1], ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, padding)))
    if count == 1:
        parts = of_chunk((states, targets))
    else:
        chunks = (
            states.reshape(rows, count, chunk, width).swapaxes(0, 1),
            targets.reshape(rows, count, chunk).swapaxes(0, 1),
        )
        parts = jax.lax.map(jax.checkpoint(of_chunk), chunks)
        parts = [part.swapaxes(0, 1).reshape(rows, -1) for part in parts]
    return TokenLogps(*(jnp.pad(part[:, : length - 1], ((0, 0), (1, 0))) for part in parts))


def pair_sums(
    values: PerToken,
    loss_mask: Bool[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    sides: Int[Array, "R T"],
    *,
    pairs: int,
) -> Float[Array, "B 2"]:
    """Sums over the learned tokens of each answer: column 0 chosen, column 1 rejected.

    Pair b has segment id b + 1; its chosen tokens have side 1, its rejected ones side 2.
    """
    answer = jnp.where(loss_mask, (segment_ids - 1) * 2 + sides - 1, 2 * pairs)
    sums = jax.ops.segment_sum(
        (values * loss_mask).ravel(), answer.ravel(), num_segments=2 * pairs + 1
    )
    return sums[:-1].reshape(pairs, 2)


# Preference losses. `chosen` and `rejected` are log-ratios log pi(y|x) - log pi_ref(y|x), written
# h_w and h_l below; s is the sigmoid, e is label_smoothing, |y| the number of learned tokens.


def sigmoid(
    chosen: PerPair, rejected: PerPair, *, beta: float, label_smoothing: float = 0.0
) -> PerPair:
    """-(1 - e) log s(beta (h_w - h_l)) - e log s(-beta (h_w - h_l)).

    Rafailov et al. (2023), Direct Preference Optimization, eq. 7; with e > 0 the conservative DPO
    of Mitchell (2023), A note on DPO with noisy preferences.
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - (
        label_smoothing * jax.nn.log_sigmoid(-margin)
    )


def ipo(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """(h_w - h_l - 1 / (2 beta))^2: Azar et al. (2023), A General Theoretical Paradigm, eq. 17.

    `ipo` divides each h by |y|, as its authors did for their results; `ipo_sum` does not.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """max(0, 1 - beta (h_w - h_l)): the loss of SLiC, Zhao et al. (2023), on likelihoods normalised
    by the reference, as in Liu et al. (2024), Statistical Rejection Sampling."""
    return jax.nn.relu(1 - beta * (chosen - rejected))


def robust(
    chosen: PerPair, rejected: PerPair, *, beta: float, label_smoothing: float = 0.0
) -> PerPair:
    """(-(1 - e) log s(beta (h_w - h_l)) + e log s(-beta (h_w - h_l))) / (1 - 2 e), which is
    unbiased when a share e of the labels is flipped: Chowdhury et al. (2024), Provably Robust
    DPO."""
    margin = beta * (chosen - rejected)
    kept = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    flipped = -label_smoothing * jax.nn.log_sigmoid(-margin)
    return (kept - flipped) / (1 - 2 * label_smoothing)


def apo_zero(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """1 - s(beta h_w) + s(beta h_l): D'Oosterlinck et al. (2024), Anchored Preference Optimization,
    eq. 7, for chosen answers that are better than the model's."""
    return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """s(beta h_w) + 1 - s(beta (h_w - h_l)): the same paper, eq. 8, for chosen answers that are
    worse than the model's."""
    return jax.nn.sigmoid(beta * chosen) + 1 - jax.nn.sigmoid(beta * (chosen - rejected))


def exo_pair(chosen: PerPair, rejected: PerPair, *, beta: float, label_smoothing: float) -> PerPair:
    """KL(p || q) with p = (s(m), s(-m)), m = beta (h_w - h_l) and q = (1 - e, e): Ji et al. (2024),
    Towards Efficient Exact Optimization, eq. 16."""
    margin = beta * (chosen - rejected)
    to_chosen = jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing)
    to_rejected = jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing)
    return jax.nn.sigmoid(margin) * to_chosen + jax.nn.sigmoid(-margin) * to_rejected


def nca_pair(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """-log s(beta h_w) - (log s(-beta h_w) + log s(-beta h_l)) / 2: Chen et al. (2024), Noise
    Contrastive Alignment, for two answers."""
    good, bad = beta * chosen, beta * rejected
    repelled = jax.nn.log_sigmoid(-good) + jax.nn.log_sigmoid(-bad)
    return -jax.nn.log_sigmoid(good) - repelled / 2


class PreferenceLoss(NamedTuple):
    function: Callable[..., PerPair]
    per_token: bool = False  # each log-ratio is divided by the number of its answer's tokens
    smoothed: bool = False  # takes label_smoothing


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid, smoothed=True),
    "ipo": PreferenceLoss(ipo, per_token=True),
    "ipo_sum": PreferenceLoss(ipo),
    "hinge": PreferenceLoss(hinge),
    "robust": PreferenceLoss(robust, smoothed=True),
    # length-normalised DPO: Lambert et al. (2024), Tulu 3
    "sigmoid_norm": PreferenceLoss(sigmoid, per_token=True),
    "apo_zero": PreferenceLoss(apo_zero),
    "apo_down": PreferenceLoss(apo_down),
    "exo_pair": PreferenceLoss(exo_pair, smoothed=True),
    "nca_pair": PreferenceLoss(nca_pair),
}


def preference_loss(
    loss_type: str,
    logratios: Float[Array, "B 2"],
    lengths: Float[Array, "B 2"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PerPair:
    """The loss of each pair by its name.

    Args:
        loss_type: a key of PREFERENCE_LOSSES.
        logratios: log pi(y|x) - log pi_ref(y|x), summed over learned tokens; chosen, rejected.
        lengths: learned tokens of each answer.
        beta: strength of the tie to the reference (tau of the IPO paper).
        label_smoothing: share of wrong labels, for the losses that take it.
    """
    loss = PREFERENCE_LOSSES[loss_type]
    if loss.per_token:
        logratios = logratios / jnp.maximum(lengths, 1)
    smoothing = {"label_smoothing": label_smoothing} if loss.smoothed else {}
    return loss.function(logratios[:, 0], logratios[:, 1], beta=beta, **smoothing)
