"""Direct preference optimisation (Rafailov et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easyaira.algorithms import reference as references
from easyaira.algorithms import reference_cache, row_numbers
from easyaira.algorithms.kto import kto_sums
from easyaira.algorithms.reference import make_score, reference_model
from easyaira.algorithms.reference_cache import check_equal
from easyaira.config.dpo import LOSSES, DPOConfig
from easyaira.config.run import TrainDPO
from easyaira.data.examples import Examples
from easyaira.data.mismatch import mismatched
from easyaira.data.recipe import Recipe, recipe_of
from easyaira.errors import ConfigError
from easyaira.losses import preference, token_logps
from easyaira.models.model import Model
from easyaira.train import loader, metrics
from easyaira.train.algorithm import Algorithm, Beginning
from easyaira.train.setup import Setup
from easyaira.train.step import LossFn, Sums


class AnswerScores(NamedTuple):
    """Sums over the learned tokens of each answer, [B, K]; of a pair: chosen, rejected."""

    logps: jax.Array
    lengths: jax.Array
    top1: jax.Array
    logits: jax.Array
    aligned: jax.Array  # logps - log_sum_sq_probs
    ends: jax.Array | None = None  # logps of the last token alone


def answer_scores(
    model: Model,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    examples: int,
    answers: int = 2,
    tail: float = 1.0,
    key: Any = None,
) -> AnswerScores:
    """Score the answers of each of `examples` prompts with `params`; `tail`: see
    `preference.answer_sums`."""
    hidden, head = model.apply(params, batch, key)
    tokens, learned = batch["tokens"], batch["loss_mask"]
    out = token_logps.token_logps(hidden, head, tokens, learned, **model.head_options)

    def sums(values: jax.Array, tail: float = 1.0) -> jax.Array:
        layout = (batch[name] for name in ("loss_mask", "segment_ids", "sides"))
        counts = {"examples": examples, "answers": answers}
        return preference.answer_sums(values, *layout, **counts, tail=tail)

    lengths = sums(jnp.ones_like(out.logps))
    answer = jnp.where(learned, batch["segment_ids"] * (answers + 1) + batch["sides"], 0)
    is_last = learned & (answer != jnp.pad(answer[:, 1:], ((0, 0), (0, 1))))
    last = out.logps * is_last
    rest = map(sums, (out.is_top1, out.mean_logits, out.logps - out.log_sum_sq_probs, last))
    return AnswerScores(sums(out.logps, tail), lengths, *rest)


def dpo(
    model: Model,
    config: DPOConfig,
    *,
    examples: int,
    answers: int = 2,
    reference: Model | None = None,
) -> LossFn:
    """Preference loss over the answers to the `examples` prompts of a micro-batch.

    The reference's log-probabilities are the batch's `ref_logps`. If `reference` is given, the step
    computes them from the frozen weights instead. Losses without a reference set them to 0."""

    options = {"examples": examples, "answers": answers, "tail": config.tail}

    def loss_fn(params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: Any) -> Sums:
        policy = answer_scores(model, params, batch, **options, key=key)
        if config.reference == "none":
            ref_logps = jnp.zeros_like(policy.logps)
        elif reference is None:
            ref_logps = batch["ref_logps"]
        else:
            ref_logps = answer_scores(reference, frozen, batch, **options).logps
            ref_logps = jax.lax.stop_gradient(ref_logps)
        return sums_of(config)(policy, ref_logps, config, **numbers_in(batch))

    return loss_fn


def numbers_in(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Labels, margins, weights and ranks of a batch's examples, if it has them."""
    return {name: batch[name] for name in row_numbers.NAMES if name in batch}


def sums_of(config: DPOConfig) -> Callable[..., Sums]:
    """The function from policy and reference scores to sums of the loss and metrics."""
    return kto_sums if config.unpaired else dpo_sums


def dpo_sums(
    policy: AnswerScores,
    ref_logps: jax.Array,
    config: DPOConfig,
    margins: jax.Array | None = None,
    weights: jax.Array | None = None,
    ranks: jax.Array | None = None,
) -> Sums:
    """Sums and counts of the loss and metrics over prompts; a prompt counts as its pairs' mean.

    Args:
        policy, ref_logps: scores of policy and reference, [B, K].
        margins: of pairs, [B]; only where K is 2.
        weights: factors of each prompt's loss, but not of its count.
        ranks: of the answers, [B, K]; default: chosen and rejected.
    """
    real = (policy.lengths[:, 0] > 0).astype(jnp.float32)  # the last update may have fewer prompts
    pairs = preference.pairs_of(policy.logps.shape[1], config.answers == "best_rest")
    share = real if ranks is None else preference.shares(ranks, pairs).ravel()
    of_pairs = partial(preference.sides, pairs=pairs)
    lengths = of_pairs(policy.lengths)
    logratios = policy.logps - ref_logps
    scores = preference.divergence_score(
        config.f_divergence_type, logratios, alpha=config.f_alpha_divergence_coef
    )
    loss = jnp.zeros_like(share)
    for name, weight in config.losses.items():
        loss += weight * preference.preference_loss(
            name,
            of_pairs(scores),
            lengths,
            beta=config.beta,
            margins=None if margins is None else jnp.repeat(margins, len(pairs)),
            label_smoothing=config.label_smoothing,
            simpo_gamma=config.simpo_gamma,
            dpop_lambda=config.dpop_lambda,
        )
    if config.use_weighting:
        loss *= preference.wpo_weights(of_pairs(policy.aligned), lengths)
    loss = (loss * share).reshape(len(real), -1).sum(1)
    if config.answers == "plackett_luce" and ranks is not None:
        weight = config.losses["sigmoid"]
        loss = weight * preference.plackett_luce(config.beta * scores, ranks)
    rewards = of_pairs(config.beta * jax.lax.stop_gradient(logratios))
    if config.reference == "none":
        rewards /= preference.divisor(config.losses, lengths)
    differences = rewards[:, 0] - rewards[:, 1]
    logps, logits = of_pairs(policy.logps), of_pairs(policy.logits)
    tokens = (lengths * share[:, None]).sum(0)
    longer = lengths[:, 0] - lengths[:, 1]
    unequal = share * (longer != 0)

    def over_pairs(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (values * share).sum(), real.sum()

    def over_prompts(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (values * real).sum(), real.sum()

    sums = {
        "rewards/chosen": over_pairs(rewards[:, 0]),
        "rewards/rejected": over_pairs(rewards[:, 1]),
        "rewards/margins": over_pairs(differences),
        "rewards/accuracies": over_pairs((differences > 0).astype(jnp.float32)),
        "rewards/longer": (((differences * longer > 0) * unequal).sum(), unequal.sum()),
        "logps/chosen": over_pairs(logps[:, 0]),
        "logps/rejected": over_pairs(logps[:, 1]),
        "logits/chosen": ((logits[:, 0] * share).sum(), tokens[0]),
        "logits/rejected": ((logits[:, 1] * share).sum(), tokens[1]),
        "mean_token_accuracy": ((of_pairs(policy.top1)[:, 0] * share).sum(), tokens[0]),
    }
    if config.nll_weight:
        # Pang et al. (2024), Iterative Reasoning Preference Optimization, eq. 2: per token of the
        # chosen answer (the best, if there are several)
        nll = -policy.logps[:, 0] / jnp.maximum(policy.lengths[:, 0], 1)
        loss = loss + config.nll_weight * nll
        sums["nll_loss"] = over_prompts(nll)
    if weights is not None:
        loss *= weights
    return {"loss": over_prompts(loss)} | sums


def dpo_algorithm(config: TrainDPO) -> Algorithm:
    """DPO, as `run` expects an algorithm."""
    compared = config.dpo.reference == "model"
    in_step = compared and not config.dpo.precompute_ref_log_probs
    stored = compared and config.dpo.precompute_ref_log_probs

    def known(setup: Setup) -> dict[str, tuple[int, ...]]:
        answers = setup.batches.examples.answers
        shapes: dict[str, tuple[int, ...]] = {"ref_logps": (answers,)} if stored else {}
        return shapes | row_numbers.shapes_of(setup)

    def recipe(max_length: int) -> Recipe:
        if config.dpo.unpaired:
            return recipe_of("rated", config.data, max_length)
        margin = all(LOSSES[name].margins for name in config.dpo.losses)
        options = {"margin": margin, "compared": config.dpo.compared}
        return recipe_of("pair", config.data, max_length, **options)

    def comparable(examples: Examples, max_length: int) -> Examples:
        if examples.answers > 2 and config.dpo.ld_alpha is not None:
            raise ConfigError(
                "dpo.ld_alpha: compares the lengths of two answers, and the rows have up to "
                f"{examples.answers}; leave it out, or set dpo.answers best_worst"
            )
        return examples

    def with_mismatched(examples: Examples, max_length: int) -> Examples:
        group = int(config.dpo.kto_group)
        return mismatched(examples, group, max_length=max_length, seed=config.seed)

    unpaired = {"arrange": with_mismatched, "together": int(config.dpo.kto_group)}
    return Algorithm(
        recipe=recipe,
        loss_fn=lambda setup: dpo(
            setup.model,
            config.dpo,
            examples=setup.micro_batch,
            answers=setup.batches.examples.answers,
            reference=reference_model(setup) if in_step else None,
        ),
        frozen=lambda setup: reference_model(setup) if in_step else None,
        begin=begin,
        known=known,
        **(unpaired if config.dpo.unpaired else {"arrange": comparable}),
    )


def begin(setup: Setup, params: Any, folder: Path, first: bool) -> Beginning:
    """Compute reference log-probabilities or load reference weights; measure the first batch.

    Raises:
        ConfigError: policy and reference have the same weights but differ in log-probabilities.
    """
    config: TrainDPO = setup.config
    known, known_held_out = row_numbers.known_of(setup, row_numbers.names_of(setup))
    if config.dpo.reference == "none":
        return Beginning(None, known, known_held_out)
    own = config.model.ref_name_or_path is None
    answers = setup.batches.examples.answers

    def score_of(model: Model) -> Callable[..., Any]:
        options = {"examples": setup.micro_batch, "answers": answers, "tail": config.dpo.tail}
        return make_score(partial(answer_scores, model, **options))

    score = score_of(setup.model)
    score_ref = score if own else score_of(reference_model(setup))
    frozen = None
    if config.dpo.precompute_ref_log_probs:
        weights = (
            (lambda: params)
            if own and first
            else cache(lambda: references.reference_weights(setup))
        )
        known["ref_logps"] = reference_cache.logps_of(
            setup, setup.batches, "train", weights, score_ref, folder, first
        )
        if setup.held_out:
            known_held_out["ref_logps"] = reference_cache.logps_of(
                setup, setup.held_out, "held_out", weights, score_ref, folder, first
            )
        del weights
    else:
        frozen = references.reference_weights(setup)
    if not first:
        return Beginning(frozen, known, known_held_out)
    batch = replace(setup.batches, known=known)[0]
    arrays = loader.to_device(batch, setup.mesh)
    policy = score(params, arrays)
    ref_logps = arrays["ref_logps"] if frozen is None else score_ref(frozen, arrays).logps
    if own:
        repeated = score(params, arrays).logps
        check_equal(*jax.device_get((policy.logps, ref_logps, policy.lengths, repeated)))
    totals = jax.jit(partial(first_sums, config.dpo))(policy, ref_logps, numbers_in(arrays))
    at_start = metrics.averages(metrics.add({}, totals))
    if not config.dpo.unpaired and "ref_logps" in known and answers == 2:
        at_start |= references.preferences(known["ref_logps"], setup.batches.examples)
    return Beginning(frozen, known, known_held_out, at_start)


def first_sums(
    config: DPOConfig, policy: AnswerScores, ref_logps: jax.Array, numbers: Mapping[str, jax.Array]
) -> Sums:
    """Sums and counts of the loss and metrics over all micro-batches of the first update."""
    of_part = sums_of(config)
    sums = jax.vmap(lambda scores, ref, own: of_part(scores, ref, config, **own))(
        policy, ref_logps, numbers
    )
    totals = {name: (total.sum(), count.sum()) for name, (total, count) in sums.items()}
    if not config.unpaired:
        real = policy.lengths[..., 0] > 0
        totals["logps/end"] = ((policy.ends[..., 0] * real).sum(), real.sum())
    return totals
