"""The reference model of DPO and on-policy runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from easyaira.data.batches import LAYOUT
from easyaira.data.examples import Examples
from easyaira.distributed.sharding import constrain
from easyaira.errors import ConfigError
from easyaira.models.model import Model
from easyaira.models.registry import model_of
from easyaira.storage import pretrained
from easyaira.train.setup import Setup


def reference_model(setup: Setup) -> Model:
    """The reference model; the policy's own model if none is configured.

    Raises:
        ConfigError: it does not share the policy's vocabulary.
    """
    name = setup.config.model.ref_name_or_path  # type: ignore[attr-defined]
    if name is None:
        return setup.model
    origin = pretrained.find(name)
    model = model_of(origin.config, str(origin.folder), setup.model.compute, scorer=False)
    origin.check(model)
    if model.vocab_size != setup.model.vocab_size:
        raise ConfigError(
            f"model.ref_name_or_path: its vocabulary has {model.vocab_size} tokens, but the "
            f"policy's has {setup.model.vocab_size}; a reference must share the policy's tokenizer"
        )
    return model


def reference_weights(setup: Setup) -> Any:
    """Load the reference weights: by default the policy's weights before the first update."""
    name = setup.config.model.ref_name_or_path  # type: ignore[attr-defined]
    if name is None:
        return setup.start_weights()
    return pretrained.find(name).load(reference_model(setup), setup.mesh)


def make_score(
    of_part: Callable[[Any, Mapping[str, jax.Array]], Any], names: Sequence[str] = LAYOUT
) -> Callable[[Any, Mapping[str, jax.Array]], Any]:
    """(weights, batch) -> results of `of_part(weights, micro_batch)`, [A, ...]: A micro-batches.

    Policy and reference use the same compiled program, so that equal weights give equal bits.

    Args:
        names: the batch's arrays that `of_part` reads.
    """

    @jax.jit
    def score(weights, parts):
        scores = jax.lax.map(partial(of_part, weights), parts)
        return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), scores)

    # other arrays, such as known reference log-probabilities, would make another program
    return lambda weights, batch: score(weights, {name: batch[name] for name in names})


FAR = 1.0  # nats per token


def preferences(ref_logps: np.ndarray, examples: Examples) -> dict[str, float]:
    """Share of pairs whose chosen, or rejected, answer is by far the likelier one per token.

    Args:
        ref_logps: summed log-probabilities by the reference, [n, 2]: chosen, rejected.
        examples: the n pairs.
    """
    lengths = np.diff(examples.bounds[:, 1:]) - examples.unseen[:, None]
    per_token = ref_logps / np.maximum(lengths, 1)
    difference = per_token[:, 0] - per_token[:, 1]
    return {
        "reference/prefers_chosen": float(np.mean(difference > FAR)),
        "reference/prefers_rejected": float(np.mean(difference < -FAR)),
    }
