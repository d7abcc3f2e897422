"""Proximal policy optimisation (Schulman et al., 2017), with a value model, and the KL divergence
as a penalty (Ziegler et al., 2019; Ouyang et al., 2022).

Shapes: G completions of a rollout and B of a micro-batch, of at most C tokens. The value at a token
is the value of the text before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.algorithms.on_policy import Completions, clip_shares
from easyaira.config.rl import RLConfig
from easyaira.train.step import Sums


def token_rewards(
    scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, config: RLConfig
) -> np.ndarray:
    """-beta KL of each token, plus the score at the last: Ziegler et al. (2019), eq. 2, [G, C].

    Args:
        scores: [G].
        kl: [G, C] log pi(token) - log pi_ref(token).
        mask: [G, C] real tokens.
    """
    rewards = -config.beta * kl * mask
    last = mask.sum(1) - 1
    rewards[np.arange(len(scores)), last] += scores
    return rewards


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Generalised advantage estimates [G, C]: Schulman et al. (2016), eq. 16.

    Args:
        rewards, values: [G, C], 0 where there is no token, so the value after the last one is 0.
    """
    advantages = np.zeros_like(rewards)
    following = next_value = np.zeros(len(rewards), rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = following = delta + gamma * lam * following
        next_value = values[:, t]
    return advantages


def whitened(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Values [G, C] of real tokens with mean 0 and standard deviation 1; 0 elsewhere."""
    real = values[mask]
    variance = real.var(ddof=1) if len(real) > 1 else 0.0
    return (values - real.mean()) / np.sqrt(variance + 1e-6) * mask


def targets(
    scores: np.ndarray, kl: np.ndarray, values: np.ndarray, mask: np.ndarray, config: RLConfig
) -> dict[str, np.ndarray]:
    """Targets of policy and value model, fixed before the first update of a rollout.

    Args:
        scores: [G]; kl, values, mask: [G, C].

    Returns:
        advantages [G, C], whitened over the rollout; returns [G, C], the targets of the values;
        explained_variance [G], the share of the returns' variance that the values explain.
    """
    values = values * mask
    advantages = gae(token_rewards(scores, kl, mask, config), values, config.gamma, config.lam)
    advantages = advantages * mask
    returns = advantages + values
    spread = returns[mask].var()
    explained = 1 - advantages[mask].var() / spread if spread else 0.0
    return {
        "advantages": whitened(advantages, mask),
        "returns": returns,
        "explained_variance": np.full(len(scores), explained),
    }


def loss(policy: Completions, config: RLConfig) -> Sums:
    """Clipped policy loss (Schulman et al., 2017, eq. 7) + vf_coef x clipped value loss, each the
    mean over tokens."""
    mask, A_BC, count = policy.mask, policy.advantages, policy.mask.sum()
    ratio_BC = jnp.exp(policy.logps - policy.old_logps)
    clipped_BC = jnp.clip(ratio_BC, *config.clip)
    policy_loss = (-jnp.minimum(ratio_BC * A_BC, clipped_BC * A_BC) * mask).sum()
    change_BC = policy.values - policy.old_values
    near_BC = policy.old_values + jnp.clip(
        change_BC, -config.cliprange_value, config.cliprange_value
    )
    errors = (policy.values - policy.returns) ** 2, (near_BC - policy.returns) ** 2
    value_loss = 0.5 * (jnp.maximum(*errors) * mask).sum()
    sums = clip_shares(ratio_BC, A_BC, mask, config)
    if config.beta:
        sums["kl"] = ((policy.old_logps - policy.ref_logps) * mask).sum(), count
    return {
        "loss": (policy_loss + config.vf_coef * value_loss, count),
        "policy_loss": (jax.lax.stop_gradient(policy_loss), count),
        "value_loss": (jax.lax.stop_gradient(value_loss), count),
        **sums,
    }
