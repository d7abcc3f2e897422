"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from easyaira.config.run import TrainSFT
from easyaira.data.recipe import recipe_of
from easyaira.losses import token_logps
from easyaira.models.model import Model
from easyaira.train.algorithm import Algorithm, Beginning
from easyaira.train.step import LossFn, Sums


def sft(model: Model) -> LossFn:
    """Negative log-likelihood per token in the loss mask."""

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        hidden, head = model.apply(params, batch, key)
        tokens, learned = batch["tokens"], batch["loss_mask"]
        nll, out = token_logps.token_nll(hidden, head, tokens, learned, **model.head_options)
        count = learned.sum().astype(jnp.float32)
        return {
            "loss": (nll, count),
            "mean_token_accuracy": (out.is_top1.sum(), count),
            "entropy": (out.entropy.sum(), count),
        }

    return loss_fn


def sft_algorithm(config: TrainSFT) -> Algorithm:
    """SFT, as `run` expects an algorithm."""
    return Algorithm(
        recipe=lambda max_length: recipe_of("conversation", config.data, max_length, config.sft),
        loss_fn=lambda setup: sft(setup.model),
        frozen=lambda setup: None,
        begin=lambda setup, params, folder, first: Beginning(),
    )
