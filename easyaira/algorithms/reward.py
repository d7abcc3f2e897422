"""Reward modelling: scores from pairs, or from labelled texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.algorithms import row_numbers
from easyaira.config.algorithms import RewardConfig
from easyaira.config.run import TrainReward
from easyaira.data.dataset import task_of
from easyaira.data.recipe import recipe_of
from easyaira.losses.scores import binary, bradley_terry, centering, roc_auc
from easyaira.models.model import Model
from easyaira.train.algorithm import Algorithm, Beginning
from easyaira.train.step import PER_EXAMPLE, LossFn, Sums


def reward(model: Model, config: RewardConfig, *, examples: int, answers: int) -> LossFn:
    """Loss over the scores of the `examples` examples of a micro-batch.

    With two answers: the Bradley-Terry loss of the first over the second. With one text: binary
    cross-entropy; the batch's `labels` say whether its score should be positive."""

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        scores, present = model.score(params, batch, key, examples=examples, answers=answers)
        if answers == 2:
            sides = scores[:, 0], scores[:, 1]
            loss = bradley_terry(*sides, margin=batch.get("margins", config.margin))
            if config.center_rewards_coefficient:
                loss += config.center_rewards_coefficient * centering(*sides)
            loss *= batch.get("weights", 1.0)
            margins = scores[:, 0] - scores[:, 1]
            is_better = jnp.broadcast_to(jnp.array([True, False]), scores.shape)
        else:
            is_better = (batch["labels"] == config.positive_label)[:, None]
            loss = binary(scores[:, 0], is_better[:, 0])
            margins = jnp.where(is_better, scores, -scores)[:, 0]
        real = present[:, 0].astype(jnp.float32)  # the last update may have fewer examples

        def over_examples(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.where(present[:, 0], values, 0).sum(), real.sum()

        return {
            "loss": over_examples(loss),
            "accuracy": over_examples((margins > 0).astype(jnp.float32)),
            "margin": over_examples(margins),
            PER_EXAMPLE: {"scores": scores, "is_better": is_better},
        }

    return loss_fn


def reward_summary(examples: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Metrics over all held-out scores together."""
    scores, is_better = examples["scores"], examples["is_better"]
    return {"auc": roc_auc(scores[is_better], scores[~is_better])}


def reward_algorithm(config: TrainReward) -> Algorithm:
    """Reward modelling, as `run` expects an algorithm; the data's columns decide the task."""

    def begin(setup, params, folder, first):
        names = row_numbers.names_of(setup)
        return Beginning(None, *row_numbers.known_of(setup, names, margin=config.reward.margin))

    return Algorithm(
        recipe=lambda max_length: recipe_of(
            task_of(config.data, ("pair", "label")), config.data, max_length
        ),
        loss_fn=lambda setup: reward(
            setup.model,
            config.reward,
            examples=setup.micro_batch,
            answers=setup.batches.examples.answers,
        ),
        frozen=lambda setup: None,
        begin=begin,
        scorer=True,
        known=lambda setup: dict.fromkeys(row_numbers.names_of(setup), ()),
        summary=reward_summary,
    )
