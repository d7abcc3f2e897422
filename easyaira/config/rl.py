"""Options of on-policy training. Names follow TRL where the meaning is the same.

The string below an option is its `--help`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from easyaira.config.ranges import (
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Share,
    TopP,
    refuse_others,
)
from easyaira.errors import ConfigError

ONLY_OF = {  # option: the only algorithm that it applies to
    **dict.fromkeys(("loss_type", "scale_rewards"), "grpo"),
    "normalize_advantages": "rloo",
    **dict.fromkeys(("value_model", "value_learning_rate", "gamma", "lam"), "ppo"),
    **dict.fromkeys(("cliprange_value", "vf_coef"), "ppo"),
}


def others_only(options: Mapping[str, Any]) -> dict[str, str]:
    """Options that apply only to another algorithm than the chosen one, with its name."""
    return {name: of for name, of in ONLY_OF.items() if of != options["algorithm"]}


@dataclass(frozen=True)
class RLConfig:
    """On-policy training: the model answers prompts, and rewards of its answers train it."""

    reward: str | list[str]
    """Reward of an answer: a reward model (run folder, Hugging Face folder or hub id), or
    file.py:function or module:function, whose code is run; several are added up. A function takes
    prompts, completions and columns of data.train as lists, and returns a list of numbers."""
    reward_weights: list[float] | None = None
    """Weight of each reward; default: 1."""
    eval_reward: str | list[str] | None = None
    """Reward of the answers to data.eval, such as a reward model that is not used in training;
    default: reward."""
    algorithm: Literal["grpo", "rloo", "online_dpo", "ppo"] = "grpo"
    """grpo: advantages relative to the answers of the same prompt; rloo: leave-one-out baseline, KL
    in the reward; online_dpo: the DPO loss of a prompt's two answers; ppo: value model, KL in the
    reward; see docs/rl.md."""
    num_generations: Count | None = None
    """Answers to each prompt, at least 2 (ppo: 1); default: 8, online_dpo 2, ppo 1."""
    max_completion_length: Count = 256
    """Longest answer in tokens."""
    generation_batch_size: Count | None = None
    """Answers per rollout, used in updates of train_batch_size answers each; default:
    train_batch_size, which makes every update on-policy."""
    num_iterations: Count = 1
    """Passes over the answers of a rollout."""
    temperature: Positive = 1.0
    """Divisor of the logits when answers are sampled."""
    top_k: CountOrZero = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: TopP = 1.0
    """Sample from the likeliest tokens whose probabilities add up to this."""
    temperature_in_loss: bool = False
    """Compute ratios and KL at the sampling temperature, as TRL does; false: at temperature 1."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the reward of an answer that was cut at max_completion_length."""
    beta: NonNegative = 0.05
    """Weight of the KL divergence from the reference; 0: no reference is held."""
    epsilon: Share = 0.2
    """Ratios of probabilities are clipped at 1 - epsilon and 1 + epsilon."""
    epsilon_high: Positive | None = None
    """Upper clip instead of epsilon."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] | None = None
    """grpo only: denominator of the loss. dapo (default): tokens; grpo: the tokens of each answer,
    then answers; dr_grpo: answers times max_completion_length."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """grpo only: divide advantages by the standard deviation of the rewards of the prompt (group,
    default), of the rollout (batch), or not at all."""
    normalize_advantages: bool = False
    """rloo only: scale the advantages of a rollout to mean 0 and standard deviation 1."""

    value_model: str | None = None
    """ppo only: model that the value model starts from, with the policy's tokenizer: usually the
    reward model. Default: the policy's weights, with a new head."""
    value_learning_rate: Positive | None = None
    """ppo only: peak learning rate of the value model; default: optimizer.learning_rate."""
    gamma: TopP = 1.0
    """ppo only: discount of rewards per token."""
    lam: TopP = 0.95
    """ppo only: lambda of the generalised advantage estimates."""
    cliprange_value: Positive = 0.2
    """ppo only: values are clipped at this distance from those of the rollout."""
    vf_coef: Positive = 0.1
    """ppo only: weight of the value model's loss."""

    def __post_init__(self):
        for name in ("reward", "eval_reward"):
            if getattr(self, name) in ("", []):
                raise ConfigError(f"rl.{name}: is empty; name a reward model or file.py:function")
        if self.answers_per_prompt < 2 and self.algorithm != "ppo":
            raise ConfigError(
                "rl.num_generations: 1 answer has none to be compared with; use at least 2"
            )
        if self.algorithm == "online_dpo":
            if self.answers_per_prompt != 2:
                raise ConfigError(
                    f"rl.num_generations: online_dpo compares 2 answers, not "
                    f"{self.answers_per_prompt}; leave it out"
                )
            if not self.beta:
                raise ConfigError(
                    "rl.beta: without it online_dpo has no gradient; raise it above 0"
                )
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ConfigError(
                f"rl.reward_weights: {len(self.reward_weights)} weights for {len(self.rewards)} "
                "rewards; give each reward one"
            )
        refuse_others("rl", self, others_only(vars(self)))

    @property
    def answers_per_prompt(self) -> int:
        return self.num_generations or {"online_dpo": 2, "ppo": 1}.get(self.algorithm, 8)

    @property
    def rewards(self) -> list[str]:
        return [self.reward] if isinstance(self.reward, str) else self.reward

    @property
    def eval_rewards(self) -> list[str] | None:
        """Rewards of held-out answers; None: those of the training."""
        return [self.eval_reward] if isinstance(self.eval_reward, str) else self.eval_reward

    @property
    def clip(self) -> tuple[float, float]:
        """Bounds of the ratio."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high
