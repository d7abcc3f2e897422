"""Preference losses over pairs of answers, in float32.

Shapes: R rows, T tokens, B examples or pairs, K answers to a prompt, P pairs of them. Losses are
not reduced: the caller knows the denominator. To add a loss, write a function and add a line to
PREFERENCE_LOSSES."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain, parts_of
from easyaira.losses.token_logps import PerToken

PerPair = Float[Array, "B"]
IsDesirable = Bool[Array, "B"]


def answer_sums(
    values: PerToken,
    loss_mask: Bool[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    sides: Int[Array, "R T"],
    *,
    examples: int,
    answers: int = 2,
    tail: float = 1.0,
) -> Float[Array, "B K"]:
    """Sum values over the learned tokens of each answer; of a pair, column 0 is chosen, column 1
    rejected.

    `tail` is the weight of the longer answer's tokens beyond the length of the shorter one: Liu et
    al. (2024), Length Desensitization in Direct Preference Optimization.

    Example b has segment id b + 1, and its answer k has side k + 1. Each device holds all tokens of
    its examples. Each sum masks all tokens of the device. A scatter-add would be cheaper, but its
    order on GPUs varies, so results would not be bitwise deterministic.
    """
    rows, length = values.shape
    shards = parts_of(rows, BATCH_AXES)
    shards = shards if examples % shards == 0 else 1
    local = examples // shards

    def by_shard(x: jax.Array) -> jax.Array:  # [S, tokens per shard]
        x = x.reshape(shards, rows // shards * length)
        return constrain(x, BATCH_AXES, None)

    answer = jnp.where(loss_mask, (segment_ids - 1) * answers + sides - 1, -1)
    first = jnp.arange(shards)[:, None] * answers * local
    wanted = first + jnp.arange(answers * local)  # [S, answers per shard]
    selected = by_shard(answer)[:, None] == wanted[..., None]
    terms = jnp.where(selected, by_shard(values)[:, None], 0)
    if tail != 1:
        lengths = selected.sum(-1).reshape(shards, local, answers)
        shared = jnp.repeat(lengths.min(-1), answers, axis=1)  # [S, answers per shard]
        terms *= jnp.where(selected.cumsum(-1) > shared[..., None], tail, 1)
    return terms.sum(-1).reshape(examples, answers)


def pairs_of(answers: int, best_rest: bool = False) -> list[tuple[int, int]]:
    """Indices (better, other) of the answers to compare; answers are stored best first.

    Args:
        best_rest: the first answer with each other one, instead of all pairs.
    """
    pairs = itertools.combinations(range(answers), 2)
    return [(i, j) for i, j in pairs if i == 0 or not best_rest]


def shares(ranks: Int[Array, "B K"], pairs: Sequence[tuple[int, int]]) -> Float[Array, "B P"]:
    """Weight of each pair: 1 / (number of the prompt's pairs that are not tied); tied: 0."""
    better = jnp.stack([ranks[:, i] < ranks[:, j] for i, j in pairs], axis=1)
    return better / jnp.maximum(better.sum(1, keepdims=True), 1)


def sides(values: Float[Array, "B K"], pairs: Sequence[tuple[int, int]]) -> Float[Array, "N 2"]:
    """Values of answers by pair, [B * P, 2]. By slices: the gradient of an indexed read is a
    scatter-add, whose order varies on GPUs."""
    if values.shape[1] == 2:
        return values
    chosen, rejected = (jnp.stack([values[:, of[n]] for of in pairs], axis=1) for n in (0, 1))
    return jnp.stack([chosen.ravel(), rejected.ravel()], axis=1)


def plackett_luce(rewards: Float[Array, "B K"], ranks: Int[Array, "B K"]) -> PerPair:
    """-sum_k log(exp r_k / (exp r_k + sum of exp r_j over the answers j below k)), with r = beta h:
    Rafailov et al. (2023), Direct Preference Optimization, appendix A.3, eq. 20.

    For two answers it is `sigmoid`. Tied answers do not compete with each other; of K answers
    without ties, it is log K! where all rewards are equal.

    Args:
        ranks: lower is better; -1: there is no such answer.
    """
    below = ranks[:, :, None] < ranks[:, None, :]
    below &= ranks[:, :, None] >= 0
    competing = below | jnp.eye(ranks.shape[1], dtype=bool)
    sums = jax.nn.logsumexp(jnp.where(competing, rewards[:, None, :], -jnp.inf), axis=-1)
    return (sums - rewards).sum(1)


def wpo_weights(aligned: Float[Array, "B 2"], lengths: Float[Array, "B 2"]) -> PerPair:
    """Probability of both answers under the policy, without a gradient: the product of
    exp(sum_t (log p(y_t) - log sum_v p(v)^2) / |y|) over the two, Zhou et al. (2024), WPO, eq. 2
    with sampled alignment.

    Args:
        aligned: sum over the learned tokens of each answer.
        lengths: learned tokens of each answer.
    """
    means = aligned / jnp.maximum(lengths, 1)
    return jax.lax.stop_gradient(jnp.exp(means.sum(-1)))


# Preference losses. `chosen` and `rejected` are log-ratios log pi(y|x) - log pi_ref(y|x), written
# h_w and h_l below; s is the sigmoid, e is label_smoothing, |y| is the number of learned tokens.
# Without a reference they are log pi(y|x): `sigmoid` is then the preference term of CPO, Xu et al.
# (2024), Contrastive Preference Optimization, and `hinge` the rank calibration loss of Zhao et
# al. (2023), SLiC-HF, with 1 / beta as the margin.


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


def bco_pair(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """-log s(beta h_w) - log s(-beta h_l): Jung et al. (2024), Binary Classifier Optimization,
    theorem 1, without the running mean of rewards, as TRL 1.16 has it: the mean would make a loss
    depend on other micro-batches."""
    return -jax.nn.log_sigmoid(beta * chosen) - jax.nn.log_sigmoid(-beta * rejected)


def sppo_hard(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2: Wu et al. (2024), Self-Play Preference
    Optimization, eq. 4.7, where the chosen answer wins with probability 1."""
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def dpop(chosen: PerPair, rejected: PerPair, *, beta: float, dpop_lambda: float) -> PerPair:
    """-log s(beta (h_w - h_l - lambda max(0, -h_w))): Pal et al. (2024), Smaug, eq. 3."""
    fallen = jax.nn.relu(-chosen)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected - dpop_lambda * fallen))


def discopop(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """(1 - s(m / t)) (-log s(m)) + s(m / t) exp(-m) with m = beta (h_w - h_l) and t = 0.05: Lu et
    al. (2024), Discovering Preference Optimization Algorithms with LLMs, eq. 5."""
    margin = beta * (chosen - rejected)
    scaled = margin / 0.05
    exponential = jnp.exp(jax.nn.log_sigmoid(scaled) - margin)  # exp(-m) alone may overflow
    return exponential - jax.nn.sigmoid(-scaled) * jax.nn.log_sigmoid(margin)


def simpo(chosen: PerPair, rejected: PerPair, *, beta: float, simpo_gamma: float) -> PerPair:
    """-log s(beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma): Meng et al. (2024),
    SimPO, eq. 6."""
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - simpo_gamma)


def orpo(chosen: PerPair, rejected: PerPair, *, beta: float) -> PerPair:
    """-beta log s(log odds(y_w) - log odds(y_l)) with odds(y) = p / (1 - p) and log p = log
    pi(y|x) / |y|: the term L_OR of Hong et al. (2024), ORPO, eq. 7, with its weight."""

    def log_odds(logps: jax.Array) -> jax.Array:
        logps = jnp.minimum(logps, -1e-6)  # a probability of 1 has no odds
        return logps - jnp.log(-jnp.expm1(logps))

    return -beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


# KTO: single answers, each of which is desirable or not.


def kl_of_groups(logratios: PerPair, group: int) -> PerPair:
    """max(0, mean of h over each `group` consecutive mismatched answers), for each of them, without
    a gradient: an estimate of KL(pi || pi_ref)."""
    means = logratios.reshape(-1, group).mean(1)
    return jax.lax.stop_gradient(jnp.repeat(jax.nn.relu(means), group))


def kto(
    logratios: PerPair,
    kl: PerPair,
    desirable: IsDesirable,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> PerPair:
    """w_D (1 - s(beta (h - z))) for a desirable answer, w_U (1 - s(beta (z - h))) for another one,
    where z is `kl`: Ethayarajh et al. (2024), KTO: Model Alignment as Prospect Theoretic
    Optimization, eq. 7."""
    margins = jnp.where(desirable, 1, -1) * beta * (logratios - kl)
    weights = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weights * jax.nn.sigmoid(-margins)


# Divergences: f'(pi / pi_ref) takes the place of h = log(pi / pi_ref), up to a constant that
# cancels between two answers: Wang et al. (2023), Beyond Reverse KL. Exponents stop at 80, before
# float32 overflows.


def divergence_score(kind: str, logratios: jax.Array, *, alpha: float = 0.5) -> jax.Array:
    """f' of the divergence, from h.

    Args:
        kind: `reverse_kl`: h; `forward_kl`: 1 - exp(-h); `js_divergence`: log 2 + log s(h);
            `alpha_divergence`: (exp((alpha - 1) h) - 1) / (alpha - 1), which is h at alpha 1.
    """
    if kind == "forward_kl":
        return 1 - jnp.exp(jnp.minimum(-logratios, 80))
    if kind == "js_divergence":
        return jnp.log(2) + jax.nn.log_sigmoid(logratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return jnp.expm1(jnp.minimum((alpha - 1) * logratios, 80)) / (alpha - 1)
    return logratios


class PreferenceLoss(NamedTuple):
    function: Callable[..., PerPair]
    per_token: bool = False  # each log-ratio is divided by the number of its answer's tokens
    options: tuple[str, ...] = ()  # further options that the function takes


_SMOOTHED = ("label_smoothing",)
# length-normalised DPO: Lambert et al. (2024), Tulu 3
_LENGTH_NORMALISED = PreferenceLoss(sigmoid, per_token=True)
PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid, options=_SMOOTHED),
    "ipo": PreferenceLoss(ipo, per_token=True),
    "ipo_sum": PreferenceLoss(ipo),
    "hinge": PreferenceLoss(hinge),
    "robust": PreferenceLoss(robust, options=_SMOOTHED),
    "sigmoid_norm": _LENGTH_NORMALISED,
    "dpo_norm": _LENGTH_NORMALISED,  # its name in open-instruct
    "apo_zero": PreferenceLoss(apo_zero),
    "apo_down": PreferenceLoss(apo_down),
    "exo_pair": PreferenceLoss(exo_pair, options=_SMOOTHED),
    "nca_pair": PreferenceLoss(nca_pair),
    "bco_pair": PreferenceLoss(bco_pair),
    "sppo_hard": PreferenceLoss(sppo_hard),
    "dpop": PreferenceLoss(dpop, options=("dpop_lambda",)),
    "discopop": PreferenceLoss(discopop),
    "simpo": PreferenceLoss(simpo, per_token=True, options=("simpo_gamma",)),
    "orpo": PreferenceLoss(orpo, per_token=True),
}


def preference_loss(
    loss_type: str,
    logratios: Float[Array, "B 2"],
    lengths: Float[Array, "B 2"],
    *,
    beta: float,
    margins: PerPair | None = None,
    **options: float,
) -> PerPair:
    """Per-pair loss of the given type.

    Args:
        loss_type: a key of PREFERENCE_LOSSES.
        logratios: log pi(y|x) - log pi_ref(y|x), summed over learned tokens, or `divergence_score`
            of them, or log pi(y|x) alone without a reference; chosen, rejected.
        lengths: learned tokens of each answer.
        beta: strength of the regularisation towards the reference (tau in the IPO paper).
        margins: subtracted from the difference of the rewards, beta (h_w - h_l): Amini et al.
            (2024), Direct Preference Optimization with an Offset.
        options: of all losses; each takes its own.
    """
    loss = PREFERENCE_LOSSES[loss_type]
    if loss.per_token:
        logratios = logratios / jnp.maximum(lengths, 1)
    own = {name: options[name] for name in loss.options if name in options}
    chosen = logratios[:, 0] if margins is None else logratios[:, 0] - margins / beta
    return loss.function(chosen, logratios[:, 1], beta=beta, **own)


def divisor(loss_types: Iterable[str], lengths: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
    """Divisor of logged rewards without a reference: tokens, if the first loss divides by them."""
    per_token = PREFERENCE_LOSSES[next(iter(loss_types))].per_token
    return jnp.maximum(lengths, 1) if per_token else jnp.ones_like(lengths)
