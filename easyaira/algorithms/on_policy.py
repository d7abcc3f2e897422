"""Shared by on-policy algorithms: batches of completions and their metrics.

Shapes: E examples of K completions each, B = E x K completions of at most C tokens. Arrays of a
batch are [E, K, ...], arrays of a loss [B, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.config.rl import RLConfig
from easyaira.data.batches import LAYOUT
from easyaira.losses.completions import completion_mask, completion_places, take
from easyaira.losses.token_logps import token_logps
from easyaira.models.model import Model
from easyaira.rewards.reward import metrics_of
from easyaira.train.step import LossFn, Sums


class Completions(NamedTuple):
    """Completions under the policy that is trained.

    Attributes:
        logps, old_logps, ref_logps: [B, C] log-probabilities by the policy, by the policy that
            sampled them, and by the reference (0 without one).
        mask: [B, C] real tokens, including the end token.
        advantages: [B], or [B, C] with a value model.
        mean_length: [B] mean length of the completions of the rollout.
        values, old_values, returns: [B, C] values of the text before each token by the current
            value model and by the rollout's, and their targets.
    """

    logps: jax.Array
    old_logps: jax.Array
    ref_logps: jax.Array
    mask: jax.Array
    advantages: jax.Array
    mean_length: jax.Array
    values: Any = None
    old_values: Any = None
    returns: Any = None


class Objective(NamedTuple):
    """An on-policy algorithm.

    Attributes:
        advantages: (rewards [P, K], KL [P, K], config) -> [P, K]; None with a value model.
        loss: (Completions, config) -> sums.
        together: completions of a prompt that the loss needs side by side.
        targets: with a value model: see ppo.targets.
    """

    advantages: Callable[[np.ndarray, np.ndarray, RLConfig], np.ndarray] | None
    loss: Callable[[Completions, RLConfig], Sums]
    together: int = 1
    targets: Callable[..., dict[str, np.ndarray]] | None = None


LOGGED = {  # name of a batch's array [B] -> metric: its mean over completions
    "rewards": "reward",
    "reward_std": "reward_std",
    "zero_std": "frac_reward_zero_std",
    "lengths": "completions/mean_length",
    "cut": "completions/clipped_ratio",
    "kl_sums": "objective/kl",
}
OF_VALUES = {"explained_variance": "value_explained_variance"}  # with a value model
VECTORS = (*LOGGED, "prompt_lengths", "mean_length", "first")  # arrays [E, K] of a batch
MATRICES = ("old_logps", "ref_logps")  # arrays [E, K, C]
VALUES = ("old_values", "returns")  # [E, K, C], with a value model


def known_of(objective: Objective, config: RLConfig, answers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a batch, per example of `answers` completions."""
    vector, matrix = (answers,), (answers, int(config.max_completion_length))
    vectors = (*VECTORS, *metrics_of(config.rewards))
    known = dict.fromkeys(vectors, vector) | dict.fromkeys(MATRICES, matrix)
    if objective.targets is None:
        return known | {"advantages": vector}
    return known | dict.fromkeys(OF_VALUES, vector) | dict.fromkeys((*VALUES, "advantages"), matrix)


def logps_of(
    model: Model, params: Any, batch: Mapping[str, jax.Array], config: RLConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of completions and entropies of their distributions, [B, C]."""
    hidden, head = model.apply(params, batch)
    options = model.head_options
    if config.temperature_in_loss:
        hidden = hidden / config.temperature  # scales the logits; their cap must shrink with them
        options["cap"] = options["cap"] and options["cap"] / config.temperature
    out = token_logps(hidden, head, batch["tokens"], batch["loss_mask"], **options)
    places = completion_places(batch, batch["prompt_lengths"], int(config.max_completion_length))
    return take(out.logps, places), take(jax.lax.stop_gradient(out.entropy), places)


def values_of(
    model: Model, params: Any, batch: Mapping[str, jax.Array], config: RLConfig
) -> jax.Array:
    """Values of the text before each token of the completions, [B, C]."""
    values, _ = model.score(params, batch, examples=1, answers=1)
    before = jnp.pad(values[:, :-1], ((0, 0), (1, 0)))
    places = completion_places(batch, batch["prompt_lengths"], int(config.max_completion_length))
    return take(before, places)


def by_completion(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays of a batch [E, K, ...] as [B, ...], without its rows of tokens."""
    return {x: batch[x].reshape(-1, *batch[x].shape[2:]) for x in batch if x not in LAYOUT}


def loss_of(
    model: Model, config: RLConfig, objective: Objective, value: Model | None = None
) -> LossFn:
    """The loss of a batch of completions. Its params are the policy's weights or, with a value
    model, `{"policy": weights, "value": weights}`.

    In the first update of a rollout, the policy is the one that sampled it. Its log-probabilities
    then have the bits of `old_logps`, so ratios are exactly 1, and the KL divergence from a
    reference with the same weights is exactly 0.
    """

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        policy = params if value is None else params["policy"]
        rows, batch = batch, by_completion(batch)
        logps, entropy = logps_of(model, policy, rows, config)
        old = batch["old_logps"]
        same = old + (logps - jax.lax.stop_gradient(logps))
        logps = jnp.where(batch["first"][:, None] > 0, same, logps)
        mask = completion_mask(batch["lengths"], logps.shape[1])
        rest = [batch[name] for name in ("advantages", "mean_length")]
        if value is not None:
            rest += [values_of(value, params["value"], rows, config)]
            rest += [batch[name] for name in VALUES]
        sums = objective.loss(Completions(logps, old, batch["ref_logps"], mask, *rest), config)
        count = jnp.float32(len(logps))
        names = LOGGED | OF_VALUES if value is not None else LOGGED
        logged = {metric: (batch[name].sum(), count) for name, metric in names.items()}
        for name in metrics_of(config.rewards):  # NaN where a function gave None
            given = ~jnp.isnan(batch[name])
            logged[name] = jnp.where(given, batch[name], 0).sum(), given.sum(dtype=jnp.float32)
        if not config.beta:
            del logged["objective/kl"]
        if config.answers_per_prompt == 1:
            del logged["frac_reward_zero_std"]
        return sums | logged | {"entropy": ((entropy * mask).sum(), mask.sum())}

    return loss_fn


def clip_shares(ratio: jax.Array, advantages: jax.Array, mask: jax.Array, config: RLConfig) -> Sums:
    """Shares of ratios whose gradient the clip removes, under TRL's names."""
    low, high = config.clip
    is_low, is_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    shares = {"low": is_low, "high": is_high, "region": is_low | is_high}
    total = mask.sum()
    return {f"clip_ratio/{name}_mean": ((x * mask).sum(), total) for name, x in shares.items()}
