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
from easyaira.losses import preference
from easyaira.losses.scores import binary, bradley_terry, centering, roc_auc
from easyaira.models.model import Model
from easyaira.train.algorithm import Algorithm, Beginning
from easyaira.train.step import PER_EXAMPLE, LossFn, Sums


def reward(model: Model, config: RewardConfig, *, examples: int, answers: int) -> LossFn:
    """Loss over the scores of the `examples` examples of a micro-batch.

    With several answers: the Bradley-Terry loss, mean over the pairs of a prompt: Ouyang et al.
    (2022), Training language models to follow instructions, eq. 1. With one text: binary
    cross-entropy; the batch's `labels` say whether its score should be positive."""
    pairs = preference.pairs_of(answers)

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        scores, present = model.score(params, batch, key, examples=examples, answers=answers)
        real = present[:, 0].astype(jnp.float32)  # the last update may have fewer examples
        share = None
        if answers > 1:
            ranks = batch.get("ranks", jnp.broadcast_to(jnp.arange(answers), scores.shape))
            numbers = batch.get("margins", config.margin), batch.get("weights", 1.0)
            if answers > 2:
                share = preference.shares(ranks, pairs).ravel()
                numbers = (jnp.repeat(jnp.broadcast_to(x, real.shape), len(pairs)) for x in numbers)
            margin, weights = numbers
            of_pairs = preference.sides(scores, pairs)
            better, worse = of_pairs[:, 0], of_pairs[:, 1]
            loss = bradley_terry(better, worse, margin=margin)
            if config.center_rewards_coefficient:
                loss += config.center_rewards_coefficient * centering(better, worse)
            loss *= weights
            margins = better - worse
            is_better = jnp.where(ranks < 0, -1, ranks == 0)
        else:
            is_better = (batch["labels"] == config.positive_label)[:, None]
            loss = binary(scores[:, 0], is_better[:, 0])
            margins = jnp.where(is_better, scores, -scores)[:, 0]

        def over_examples(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = jnp.where(present[:, 0], values, 0) if share is None else values * share
            return values.sum(), real.sum()

        return {
            "loss": over_examples(loss),
            "accuracy": over_examples((margins > 0).astype(jnp.float32)),
            "margin": over_examples(margins),
            PER_EXAMPLE: {"scores": scores, "is_better": is_better.astype(jnp.int32)},
        }

    return loss_fn


def reward_summary(examples: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Metrics over all held-out scores together; the best of several answers against the others."""
    scores, is_better = examples["scores"], examples["is_better"]
    return {"auc": roc_auc(scores[is_better == 1], scores[is_better == 0])}


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
        known=row_numbers.shapes_of,
        summary=reward_summary,
    )
