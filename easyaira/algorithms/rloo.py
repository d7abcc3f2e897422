"""REINFORCE with a leave-one-out baseline (Ahmadian et al., 2024, Back to Basics, eq. 6).

Shapes: P prompts with K completions each; B completions of at most C tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from easyaira.algorithms.on_policy import Completions, clip_shares
from easyaira.config.rl import RLConfig
from easyaira.train.step import Sums


def advantages(rewards: np.ndarray, kl: np.ndarray, config: RLConfig) -> np.ndarray:
    """r - beta KL, less its mean over the other completions of the prompt, [P, K].

    Args:
        rewards: [P, K].
        kl: [P, K] sums of log pi(token) - log pi_ref(token) over each completion.
    """
    shaped = rewards - config.beta * kl
    K = shaped.shape[1]
    advantages_PK = shaped - (shaped.sum(1, keepdims=True) - shaped) / (K - 1)
    if config.normalize_advantages:
        advantages_PK = (advantages_PK - advantages_PK.mean()) / (advantages_PK.std(ddof=1) + 1e-4)
    return advantages_PK


def loss(policy: Completions, config: RLConfig) -> Sums:
    """Clipped loss per completion; its gradient equals eq. 6 where the ratio is 1."""
    mask, A_B = policy.mask, policy.advantages
    ratio_B = jnp.exp(((policy.logps - policy.old_logps) * mask).sum(1))
    clipped_B = jnp.clip(ratio_B, *config.clip)
    loss_B = -jnp.minimum(ratio_B * A_B, clipped_B * A_B)
    sums = clip_shares(ratio_B, A_B, jnp.ones_like(A_B), config)
    if config.beta:
        sums["kl"] = ((policy.old_logps - policy.ref_logps) * mask).sum(), mask.sum()
    return {"loss": (loss_B.sum(), jnp.float32(len(loss_B)))} | sums
