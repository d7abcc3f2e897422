"""Online direct preference optimisation (Guo et al., 2024, Direct Language Model Alignment from
Online AI Feedback): the policy's own two completions of a prompt are a pair.

Shapes: P prompts with two completions each; B completions of at most C tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.algorithms.on_policy import Completions
from easyaira.config.rl import RLConfig
from easyaira.losses import preference
from easyaira.train.step import Sums


def advantages(rewards: np.ndarray, kl: np.ndarray, config: RLConfig) -> np.ndarray:
    """1 for the chosen completion of each prompt, -1 for the rejected one, [P, 2].

    The one with the higher reward is chosen; of equal ones, the first.

    Args:
        rewards: [P, 2].
        kl: unused; the loss itself compares with the reference.
    """
    second_is_better = rewards[:, 1] > rewards[:, 0]
    return np.where(second_is_better[:, None], [-1.0, 1.0], [1.0, -1.0])


def loss(policy: Completions, config: RLConfig) -> Sums:
    """-log sigmoid(beta (h_w - h_l)), h = log pi(y|x) - log pi_ref(y|x), eq. 1; mean over pairs.

    The two completions of a prompt are adjacent.
    """
    mask = policy.mask
    ratios_P2 = ((policy.logps - policy.ref_logps) * mask).sum(1).reshape(-1, 2)
    first_is_chosen = policy.advantages.reshape(-1, 2)[:, 0] > 0
    chosen = jnp.where(first_is_chosen, ratios_P2[:, 0], ratios_P2[:, 1])
    rejected = jnp.where(first_is_chosen, ratios_P2[:, 1], ratios_P2[:, 0])
    loss_P = preference.sigmoid(chosen, rejected, beta=config.beta)
    rewards = {"chosen": config.beta * chosen, "rejected": config.beta * rejected}
    rewards["margins"] = rewards["chosen"] - rewards["rejected"]
    rewards["accuracies"] = (rewards["margins"] > 0).astype(jnp.float32)
    pairs = jnp.float32(len(chosen))
    logged = {f"rewards/{name}": jax.lax.stop_gradient(x).sum() for name, x in rewards.items()}
    return {
        "loss": (loss_P.sum(), pairs),
        "kl": (((policy.old_logps - policy.ref_logps) * mask).sum(), mask.sum()),
        **{name: (total, pairs) for name, total in logged.items()},
    }
