"""Preference losses over pairs of answers, in float32.

Shapes: R rows, T tokens, B pairs. Losses are not reduced: the caller knows the denominator. To add
a loss, write a function and add a line to PREFERENCE_LOSSES."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain, parts_of
from easyaira.losses.token_logps import PerToken

PerPair = Float[Array, "B"]


def pair_sums(
    values: PerToken,
    loss_mask: Bool[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    sides: Int[Array, "R T"],
    *,
    pairs: int,
) -> Float[Array, "B 2"]:
    """Sum values over the learned tokens of each answer: column 0 chosen, column 1 rejected.

    Pair b has segment id b + 1; its chosen tokens have side 1, its rejected tokens side 2. Each
    device holds all tokens of its pairs. Each sum masks all tokens of the device. A scatter-add
    would be cheaper, but its order on GPUs varies, so results would not be bitwise deterministic.
    """
    rows, length = values.shape
    shards = parts_of(rows, BATCH_AXES)
    shards = shards if pairs % shards == 0 else 1
    local = pairs // shards

    def by_shard(x: jax.Array) -> jax.Array:  # [S, tokens per shard]
        x = x.reshape(shards, rows // shards * length)
        return constrain(x, BATCH_AXES, None)

    answer = jnp.where(loss_mask, (segment_ids - 1) * 2 + sides - 1, -1)
    first = jnp.arange(shards)[:, None] * 2 * local
    wanted = first + jnp.arange(2 * local)  # [S, answers per shard]
    selected = by_shard(answer)[:, None] == wanted[..., None]
    sums = jnp.where(selected, by_shard(values)[:, None], 0).sum(-1)
    return sums.reshape(pairs, 2)


# Preference losses. `chosen` and `rejected` are log-ratios log pi(y|x) - log pi_ref(y|x), written
# h_w and h_l below; s is the sigmoid, e is label_smoothing, |y| is the number of learned tokens.


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
    """Per-pair loss of the given type.

    Args:
        loss_type: a key of PREFERENCE_LOSSES.
        logratios: log pi(y|x) - log pi_ref(y|x), summed over learned tokens; chosen, rejected.
        lengths: learned tokens of each answer.
        beta: strength of the regularisation towards the reference (tau in the IPO paper).
        label_smoothing: assumed share of wrong labels, for the losses that take it.
    """
    loss = PREFERENCE_LOSSES[loss_type]
    if loss.per_token:
        logratios = logratios / jnp.maximum(lengths, 1)
    smoothing = {"label_smoothing": label_smoothing} if loss.smoothed else {}
    return loss.function(logratios[:, 0], logratios[:, 1], beta=beta, **smoothing)
