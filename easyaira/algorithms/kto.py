"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024): single answers, each good or bad."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from easyaira.config.dpo import DPOConfig
from easyaira.losses import preference
from easyaira.train.step import Sums

if TYPE_CHECKING:
    from easyaira.algorithms.dpo import AnswerScores


def kto_sums(
    policy: AnswerScores, ref_logps: jax.Array, config: DPOConfig, labels: jax.Array
) -> Sums:
    """Sums and counts of the loss and metrics over examples. The second answer of an example comes
    from another prompt (`data.mismatch`).

    The KL divergence is estimated per group of examples. A group is never split, so the loss does
    not depend on micro-batches and devices."""
    real = (policy.lengths[:, 0] > 0).astype(jnp.float32)
    good, bad = labels * real, (1 - labels) * real
    logratios = policy.logps - ref_logps
    kl = preference.kl_of_groups(logratios[:, 1], config.kto_group)
    loss = preference.kto(
        logratios[:, 0],
        kl,
        labels > 0,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    rewards = config.beta * jax.lax.stop_gradient(logratios[:, 0])
    sums = {"loss": ((loss * real).sum(), real.sum()), "kl": ((kl * real).sum(), real.sum())}
    for name, chosen in (("chosen", good), ("rejected", bad)):
        tokens = (policy.lengths[:, 0] * chosen).sum()
        sums |= {
            f"rewards/{name}": ((rewards * chosen).sum(), chosen.sum()),
            f"logps/{name}": ((policy.logps[:, 0] * chosen).sum(), chosen.sum()),
            f"logits/{name}": ((policy.logits[:, 0] * chosen).sum(), tokens),
        }
    return sums
