"""The reference of DPO: its log-probabilities, once before training or in every step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from easyaira import metrics, objectives, pretrained, trainer
from easyaira.config import TrainDPO
from easyaira.data.batches import LAYOUT, Batches
from easyaira.data.examples import recipe_of
from easyaira.errors import ConfigError
from easyaira.models.registry import Model, model_of
from easyaira.prepare import Algorithm, Setup

FILE = "reference_logps.npz"


def dpo_algorithm(config: TrainDPO) -> Algorithm:
    """DPO as `run` takes it."""
    in_step = not config.dpo.precompute_ref_log_probs
    return Algorithm(
        recipe=lambda max_length: recipe_of("pair", config.data, max_length),
        loss_fn=lambda setup: objectives.dpo(
            setup.model,
            config.dpo,
            pairs=setup.micro_batch,
            reference=reference_model(setup) if in_step else None,
        ),
        frozen=lambda setup: reference_model(setup) if in_step else None,
        begin=begin,
    )


def reference_model(setup: Setup) -> Model:
    """The model that policies are held to.

    Raises:
        ConfigError: it does not share the policy's vocabulary.
    """
    name = setup.config.model.ref_name_or_path
    if name is None:
        return setup.model
    found = pretrained.find(name)
    model = model_of(found.config, str(found.folder), setup.model.compute)
    found.check(model)
    if model.vocab_size != setup.model.vocab_size:
        raise ConfigError(
            f"model.ref_name_or_path: its vocabulary has {model.vocab_size} tokens and the "
            f"policy's {setup.model.vocab_size}; a reference must share the policy's tokenizer"
        )
    return model


def reference_weights(setup: Setup) -> Any:
    """Always those that were there before training, whatever has been trained since."""
    name = setup.config.model.ref_name_or_path
    if name is None:
        return setup.load()
    return pretrained.find(name).load(reference_model(setup), setup.mesh)


def begin(
    setup: Setup, params: Any, folder: Path, first: bool
) -> tuple[Any, Mapping[str, np.ndarray], Mapping[str, np.ndarray], Mapping[str, float]]:
    """The reference as training needs it, and what is measured before the first update.

    Raises:
        AssertionError: policy and reference are the same weights and do not say the same.
    """
    config: TrainDPO = setup.config
    own = config.model.ref_name_or_path is None
    score = make_score(setup.model, setup.micro_batch)
    score_ref = score if own else make_score(reference_model(setup), setup.micro_batch)
    frozen, known, known_held_out = None, {}, {}
    if config.dpo.precompute_ref_log_probs:
        file = folder / FILE
        key = _key(setup)
        logps = _read(file, key)
        if logps is None:
            weights = params if own and first else reference_weights(setup)
            held_out = [setup.held_out] if setup.held_out else []
            logps = [score_all(score_ref, weights, b, setup) for b in (setup.batches, *held_out)]
            _write(file, key, logps)
            del weights
        known, known_held_out = ({"ref_logps": values} for values in (*logps, None)[:2])
    else:
        frozen = reference_weights(setup)
    if not first:
        return frozen, known, known_held_out, {}
    batch = replace(setup.batches, known=known)[0]
    arrays = trainer.to_device(batch, setup.mesh)
    policy = score(params, arrays)
    ref_logps = arrays["ref_logps"] if known else score_ref(frozen, arrays).logps
    if own and not np.array_equal(policy.logps, ref_logps):
        raise AssertionError("policy and reference differ before the first update")
    sums = jax.vmap(lambda scores, ref: objectives.dpo_sums(scores, ref, config.dpo))(
        policy, ref_logps
    )
    before = {name: (total.sum(), count.sum()) for name, (total, count) in sums.items()}
    return frozen, known, known_held_out, metrics.averages(metrics.add({}, before))


def make_score(model: Model, pairs: int) -> Callable[[Any, Mapping[str, jax.Array]], Any]:
    """(params, batch) -> PairScores [A, B, 2]: what weights say of pairs.

    Policy and reference go through the same program, so that equal weights give equal bits.
    """

    def score(params, batch):
        def of_part(part):
            return objectives.pair_scores(model, params, part, pairs=pairs)

        return jax.lax.map(of_part, {name: batch[name] for name in LAYOUT})

    return jax.jit(score)


def score_all(score: Callable, params: Any, batches: Batches, setup: Setup) -> np.ndarray:
    """Log-probabilities of both answers of every example, [n, 2], gone through as training does."""
    batches = replace(batches, drop_last=False)
    logps = np.zeros((len(batches.examples), 2), np.float32)
    updates = trainer.ahead(batches, 0, len(batches), setup.mesh)
    for ready in tqdm(updates, "reference", len(batches), unit=" batches", disable=None):
        scored = np.asarray(score(params, ready.arrays).logps)
        logps[ready.batch.examples] = scored[tuple(ready.batch.slots.T)]
    return logps


def _key(setup: Setup) -> str:
    config = setup.config
    return f"{setup.data.report['fingerprint']} {config.model.ref_name_or_path or 'policy'}"


def _read(file: Path, key: str) -> list[np.ndarray] | None:
    if not file.exists():
        return None
    stored = np.load(file, allow_pickle=False)
    if str(stored["key"]) != key:
        return None
    return [stored[name] for name in sorted(stored.files) if name != "key"]


def _write(file: Path, key: str, logps: list[np.ndarray]) -> None:
    new = file.with_name("." + file.name)
    np.savez(new, key=key, **{f"part_{i}": values for i, values in enumerate(logps)})
    os.replace(new, file)
