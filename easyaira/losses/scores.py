"""Losses and metrics of scores, in float32. Shapes: B examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from easyaira.losses.preference import PerPair

# Losses of scores: one number for each text.

IsPositive = Bool[Array, "B"]


def bradley_terry(chosen: PerPair, rejected: PerPair, *, margin: PerPair | float = 0.0) -> PerPair:
    """-log s(r_w - r_l - margin): the reward model of Ouyang et al. (2022), Training language
    models to follow instructions, eq. 1; with the margin of Touvron et al. (2023), Llama 2, eq. 2.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def centering(chosen: PerPair, rejected: PerPair) -> PerPair:
    """(r_w + r_l)^2, since only the difference of scores decides the Bradley-Terry loss: Eisenstein
    et al. (2023), Helping or Herding?"""
    return (chosen + rejected) ** 2


def binary(scores: PerPair, positive: IsPositive) -> PerPair:
    """Binary cross-entropy: -log s(r) for a positive text, -log s(-r) for a negative one."""
    return -jax.nn.log_sigmoid(jnp.where(positive, scores, -scores))


def roc_auc(better: np.ndarray, worse: np.ndarray) -> float | None:
    """Area under the ROC curve: share of (better, worse) combinations where the better score is
    higher; ties count half. Exact; None if either array is empty."""
    if not len(better) or not len(worse):
        return None
    worse = np.sort(worse)
    below, up_to = (np.searchsorted(worse, better, side) for side in ("left", "right"))
    return float(int(below.sum()) + int(up_to.sum())) / (2 * len(better) * len(worse))
