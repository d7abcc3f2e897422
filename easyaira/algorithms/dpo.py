"""Direct preference optimisation (Rafailov et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easyaira.algorithms import reference as references
from easyaira.algorithms import reference_cache
from easyaira.algorithms.reference import reference_model
from easyaira.algorithms.reference_cache import check_equal
from easyaira.config.dpo import DPOConfig
from easyaira.config.run import TrainDPO
from easyaira.data.batches import LAYOUT
from easyaira.data.recipe import recipe_of
from easyaira.distributed.sharding import constrain
from easyaira.losses import preference, token_logps
from easyaira.models.model import Model
from easyaira.train import loader, metrics
from easyaira.train.algorithm import Algorithm, Beginning
from easyaira.train.setup import Setup
from easyaira.train.step import LossFn, Sums


class PairScores(NamedTuple):
    """Sums over the learned tokens of each answer, [B, 2]: chosen, rejected."""

    logps: jax.Array
    lengths: jax.Array
    top1: jax.Array
    logits: jax.Array


def pair_scores(
    model: Model, params: Any, batch: Mapping[str, jax.Array], *, pairs: int, key: Any = None
) -> PairScores:
    """Score both answers of each of `pairs` pairs with `params`."""
    hidden, head = model.apply(params, batch, key)
    tokens, learned = batch["tokens"], batch["loss_mask"]
    out = token_logps.token_logps(hidden, head, tokens, learned, **model.head_options)

    def sums(values: jax.Array) -> jax.Array:
        layout = (batch[name] for name in ("loss_mask", "segment_ids", "sides"))
        return preference.pair_sums(values, *layout, pairs=pairs)

    return PairScores(
        sums(out.logps), sums(jnp.ones_like(out.logps)), sums(out.is_top1), sums(out.mean_logits)
    )


def dpo(model: Model, config: DPOConfig, *, pairs: int, reference: Model | None = None) -> LossFn:
    """Preference loss over the `pairs` pairs of a micro-batch.

    The reference's log-probabilities are the batch's `ref_logps`. If `reference` is given, the step
    computes them from the frozen weights instead. Losses without a reference take none."""

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        policy = pair_scores(model, params, batch, pairs=pairs, key=key)
        if config.reference == "none":
            ref_logps = jnp.zeros_like(policy.logps)
        elif reference is None:
            ref_logps = batch["ref_logps"]
        else:
            ref_logps = pair_scores(reference, frozen, batch, pairs=pairs).logps
            ref_logps = jax.lax.stop_gradient(ref_logps)
        return dpo_sums(policy, ref_logps, config)

    return loss_fn


def dpo_sums(policy: PairScores, ref_logps: jax.Array, config: DPOConfig) -> Sums:
    """Sums and counts of the loss and metrics over pairs."""
    real = (policy.lengths[:, 0] > 0).astype(jnp.float32)  # the last update may have fewer pairs
    logratios = policy.logps - ref_logps
    scores = preference.divergence_score(
        config.f_divergence_type, logratios, alpha=config.f_alpha_divergence_coef
    )
    loss = jnp.zeros_like(real)
    for name, weight in config.losses.items():
        loss += weight * preference.preference_loss(
            name,
            scores,
            policy.lengths,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            simpo_gamma=config.simpo_gamma,
            dpop_lambda=config.dpop_lambda,
        )
    rewards = config.beta * jax.lax.stop_gradient(logratios)
    if config.reference == "none":
        rewards /= preference.divisor(config.losses, policy.lengths)
    margins = rewards[:, 0] - rewards[:, 1]
    tokens = policy.lengths.sum(0)

    def over_pairs(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (values * real).sum(), real.sum()

    sums = {
        "rewards/chosen": over_pairs(rewards[:, 0]),
        "rewards/rejected": over_pairs(rewards[:, 1]),
        "rewards/margins": over_pairs(margins),
        "rewards/accuracies": over_pairs((margins > 0).astype(jnp.float32)),
        "logps/chosen": over_pairs(policy.logps[:, 0]),
        "logps/rejected": over_pairs(policy.logps[:, 1]),
        "logits/chosen": (policy.logits[:, 0].sum(), tokens[0]),
        "logits/rejected": (policy.logits[:, 1].sum(), tokens[1]),
        "mean_token_accuracy": (policy.top1[:, 0].sum(), tokens[0]),
    }
    if config.nll_weight:
        # Pang et al. (2024), Iterative Reasoning Preference Optimization, eq. 2: per chosen token
        nll = -policy.logps[:, 0] / jnp.maximum(policy.lengths[:, 0], 1)
        loss = loss + config.nll_weight * nll
        sums["nll_loss"] = over_pairs(nll)
    return {"loss": over_pairs(loss)} | sums


def dpo_algorithm(config: TrainDPO) -> Algorithm:
    """DPO, as `run` expects an algorithm."""
    compared = config.dpo.reference == "model"
    in_step = compared and not config.dpo.precompute_ref_log_probs
    stored = compared and config.dpo.precompute_ref_log_probs
    return Algorithm(
        recipe=lambda max_length: recipe_of("pair", config.data, max_length),
        loss_fn=lambda setup: dpo(
            setup.model,
            config.dpo,
            pairs=setup.micro_batch,
            reference=reference_model(setup) if in_step else None,
        ),
        frozen=lambda setup: reference_model(setup) if in_step else None,
        begin=begin,
        known=lambda setup: {"ref_logps": (2,)} if stored else {},
    )


def begin(setup: Setup, params: Any, folder: Path, first: bool) -> Beginning:
    """Compute reference log-probabilities or load reference weights; measure the first batch.

    Raises:
        ConfigError: policy and reference have the same weights but differ in log-probabilities.
    """
    config: TrainDPO = setup.config
    if config.dpo.reference == "none":
        return Beginning()
    own = config.model.ref_name_or_path is None
    score = make_score(setup.model, setup.micro_batch)
    score_ref = score if own else make_score(reference_model(setup), setup.micro_batch)
    frozen, known, known_held_out = None, {}, {}
    if config.dpo.precompute_ref_log_probs:
        weights = (
            (lambda: params)
            if own and first
            else cache(lambda: references.reference_weights(setup))
        )
        known = {
            "ref_logps": reference_cache.logps_of(
                setup, setup.batches, "train", weights, score_ref, folder, first
            )
        }
        if setup.held_out:
            logps = reference_cache.logps_of(
                setup, setup.held_out, "held_out", weights, score_ref, folder, first
            )
            known_held_out = {"ref_logps": logps}
        del weights
    else:
        frozen = references.reference_weights(setup)
    if not first:
        return Beginning(frozen, known, known_held_out)
    batch = replace(setup.batches, known=known)[0]
    arrays = loader.to_device(batch, setup.mesh)
    policy = score(params, arrays)
    ref_logps = arrays["ref_logps"] if known else score_ref(frozen, arrays).logps
    if own:
        repeated = score(params, arrays).logps
        check_equal(*jax.device_get((policy.logps, ref_logps, policy.lengths, repeated)))
    sums = jax.vmap(lambda scores, ref: dpo_sums(scores, ref, config.dpo))(policy, ref_logps)
    totals = {name: (total.sum(), count.sum()) for name, (total, count) in sums.items()}
    at_start = metrics.averages(metrics.add({}, totals))
    return Beginning(frozen, known, known_held_out, at_start)


def make_score(model: Model, pairs: int) -> Callable[[Any, Mapping[str, jax.Array]], Any]:
    """(params, batch) -> PairScores [A, B, 2]: A micro-batches of B pairs.

    Policy and reference use the same compiled program, so that equal weights give equal bits.
    """

    def score(params, batch):
        def of_part(part):
            return pair_scores(model, params, part, pairs=pairs)

        scores = jax.lax.map(of_part, {name: batch[name] for name in LAYOUT})
        return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), scores)

    return jax.jit(score)
