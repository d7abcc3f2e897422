"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from easyaira.config.algorithms import SFTConfig
from easyaira.config.run import TrainSFT
from easyaira.data.recipe import recipe_of
from easyaira.losses import token_logps
from easyaira.losses.router import balance
from easyaira.models.model import Model
from easyaira.train.algorithm import Algorithm, Beginning
from easyaira.train.step import LossFn, Sums

PLAIN = SFTConfig()


def sft(model: Model, config: SFTConfig = PLAIN) -> LossFn:
    """Negative log-likelihood per token in the loss mask.

    With `router_aux_loss`, plus the balance loss of each example, times its number of such tokens.
    With `dft`, a token's loss is weighted by its probability, taken as constant: Wu et al. (2025),
    On the Generalization of SFT, dynamic fine-tuning."""

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        if config.router_aux_loss:
            hidden, head, router = model.apply_routed(params, batch, key)
        else:
            hidden, head = model.apply(params, batch, key)
        inputs = hidden, head, batch["tokens"], batch["loss_mask"]
        if config.loss_type == "dft":
            out = token_logps.token_logps(*inputs, **model.head_options)
            loss = -(jax.lax.stop_gradient(jnp.exp(out.logps)) * out.logps).sum()
        else:
            loss, out = token_logps.token_nll(
                *inputs, label_smoothing=config.label_smoothing, **model.head_options
            )
        count = batch["loss_mask"].sum().astype(jnp.float32)
        sums = {
            "loss": (loss, count),
            "mean_token_accuracy": (out.is_top1.sum(), count),
            "entropy": (out.entropy.sum(), count),
        }
        if config.router_aux_loss:
            masks = batch["segment_ids"], batch["loss_mask"]
            unbalanced = balance(router, *masks, count=model.config.num_experts_per_tok)
            sums["loss"] = loss + model.config.router_aux_loss_coef * unbalanced, count
            sums["router_aux_loss"] = unbalanced, count
        return sums

    return loss_fn


def sft_algorithm(config: TrainSFT) -> Algorithm:
    """SFT, as `run` expects an algorithm."""
    return Algorithm(
        recipe=lambda max_length: recipe_of("conversation", config.data, max_length, config.sft),
        loss_fn=lambda setup: sft(setup.model, config.sft),
        frozen=lambda setup: None,
        begin=lambda setup, params, folder, first: Beginning(),
        balanced=config.sft.router_aux_loss,
    )
