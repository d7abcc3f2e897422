"""Group relative policy optimisation (Shao et al., 2024, DeepSeekMath, eq. 3).

Shapes: P prompts with K completions each; B completions of at most C tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from easyaira.algorithms.on_policy import Completions, clip_shares
from easyaira.config.rl import RLConfig
from easyaira.train.step import Sums


def advantages(rewards: np.ndarray, kl: np.ndarray, config: RLConfig) -> np.ndarray:
    """(r - mean of the group) / (standard deviation + 1e-4), [P, K].

    Without the deviation: Liu et al. (2025), Understanding R1-Zero-Like Training, section 3.2.

    Args:
        rewards: [P, K].
        kl: unused; the KL divergence is part of the loss.
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    if config.scale_rewards == "none":
        return centred
    if config.scale_rewards == "batch":
        return centred / (rewards.std(ddof=1) + 1e-4)
    return centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)


def loss(policy: Completions, config: RLConfig) -> Sums:
    """Clipped loss per token, with the KL divergence from the reference by the k3 estimator.

    The denominators follow TRL's `loss_type`: dapo is Yu et al. (2025), DAPO, eq. 8; dr_grpo is
    Liu et al. (2025), eq. 4.
    """
    mask, A_B1 = policy.mask, policy.advantages[:, None]
    ratio_BC = jnp.exp(policy.logps - policy.old_logps)
    clipped_BC = jnp.clip(ratio_BC, *config.clip)
    loss_BC = -jnp.minimum(ratio_BC * A_B1, clipped_BC * A_B1)
    sums = clip_shares(ratio_BC, A_B1, mask, config)
    if config.beta:
        log_ratio_BC = policy.ref_logps - policy.logps
        kl_BC = jnp.exp(log_ratio_BC) - log_ratio_BC - 1
        loss_BC = loss_BC + config.beta * kl_BC
        sums["kl"] = (kl_BC * mask).sum(), mask.sum()
    B, C = mask.shape
    total = (loss_BC * mask).sum()
    if config.loss_type == "grpo":
        total = ((loss_BC * mask).sum(1) / jnp.maximum(mask.sum(1), 1)).sum()
        return {"loss": (total, jnp.float32(B))} | sums
    if config.loss_type == "dr_grpo":
        return {"loss": (total, jnp.float32(B * C))} | sums
    # an even share of the rollout's tokens, so a token weighs the same in every update
    return {"loss": (total, policy.mean_length.sum())} | sums
