"""The algorithms: what is minimised, as functions for trainer.fit. Everything else is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easyaira import losses
from easyaira.config import DPOConfig
from easyaira.models.registry import Model
from easyaira.trainer import LossFn, Sums


def sft(model: Model) -> LossFn:
    """Negative log-likelihood of the learned tokens, per token."""

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        hidden, head = model.apply(params, batch, key)
        tokens, learned = batch["tokens"], batch["loss_mask"]
        nll, out = losses.token_nll(hidden, head, tokens, learned, vocab_size=model.vocab_size)
        count = learned.sum().astype(jnp.float32)
        return {
            "loss": (nll, count),
            "mean_token_accuracy": (out.is_top1.sum(), count),
            "entropy": (out.entropy.sum(), count),
        }

    return loss_fn


class PairScores(NamedTuple):
    """Sums over the learned tokens of each answer, [B, 2]: chosen, rejected."""

    logps: jax.Array
    lengths: jax.Array
    top1: jax.Array
    logits: jax.Array


def pair_scores(
    model: Model, params: Any, batch: Mapping[str, jax.Array], *, pairs: int, key: Any = None
) -> PairScores:
    """What `params` says of both answers of each of `pairs` pairs."""
    hidden, head = model.apply(params, batch, key)
    out = losses.token_logps(
        hidden, head, batch["tokens"], batch["loss_mask"], vocab_size=model.vocab_size
    )

    def sums(values: jax.Array) -> jax.Array:
        layout = (batch[name] for name in ("loss_mask", "segment_ids", "sides"))
        return losses.pair_sums(values, *layout, pairs=pairs)

    return PairScores(
        sums(out.logps), sums(jnp.ones_like(out.logps)), sums(out.is_top1), sums(out.mean_logits)
    )


def dpo(model: Model, config: DPOConfig, *, pairs: int, reference: Model | None = None) -> LossFn:
    """A preference loss over pairs, with `pairs` of them in a micro-batch.

    The reference's log-probabilities come with the batch as `ref_logps`, or, if `reference` is
    given, from the frozen weights in the step."""

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        policy = pair_scores(model, params, batch, pairs=pairs, key=key)
        if reference is None:
            ref_logps = batch["ref_logps"]
        else:
            ref_logps = pair_scores(reference, frozen, batch, pairs=pairs).logps
            ref_logps = jax.lax.stop_gradient(ref_logps)
        return dpo_sums(policy, ref_logps, config)

    return loss_fn


def dpo_sums(policy: PairScores, ref_logps: jax.Array, config: DPOConfig) -> Sums:
    """Loss and metrics of pairs, summed, with what each is an average over."""
    real = (policy.lengths[:, 0] > 0).astype(jnp.float32)  # the last update may have fewer pairs
    logratios = policy.logps - ref_logps
    loss = losses.preference_loss(
        config.loss_type,
        logratios,
        policy.lengths,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )
    rewards = config.beta * jax.lax.stop_gradient(logratios)
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
    if config.sft_weight:
        # Pang et al. (2024), Iterative Reasoning Preference Optimization, eq. 2: per chosen token
        nll = -policy.logps[:, 0] / jnp.maximum(policy.lengths[:, 0], 1)
        loss = loss + config.sft_weight * nll
        sums["nll_loss"] = over_pairs(nll)
    return {"loss": over_pairs(loss)} | sums
