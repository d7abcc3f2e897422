"""The held-out reward of an on-policy run: the policy answers prompts that it is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from easyaira.config.data import Source
from easyaira.config.run import TrainRL
from easyaira.data.dataset import questions_of
from easyaira.distributed import watchdog
from easyaira.generation.sampler import Sampler
from easyaira.rewards.reward import Reward
from easyaira.train.setup import Setup


def rewards_of(config: TrainRL) -> Iterator[tuple[list[str], str | Sequence[Source]]]:
    """Rewards of a run, each time with the prompts that they are for."""
    yield config.rl.rewards, config.data.train
    own = config.data.eval
    if own is not None:
        prompts = config.data.train if isinstance(own, int | float) else own
        yield config.rl.eval_rewards or config.rl.rewards, prompts


class HeldOut:
    """Measures the reward of one answer to each held-out prompt, sampled as in rollouts.

    The seed is the same at every evaluation.

    Args:
        sampler: of the rollouts.
        reward: of the training, used unless rl.eval_reward names another.

    Raises:
        EasyAiraError: a reward cannot be read, or a prompt leaves no room for an answer in it.
    """

    def __init__(self, setup: Setup, sampler: Sampler, reward: Reward):
        config: TrainRL = setup.config
        self.setup, self.rl, self.sampler, data = setup, config.rl, sampler, setup.data.held_out
        if self.rl.eval_rewards is not None:
            reward = Reward(self.rl.eval_rewards, None, setup.mesh, setup.model.compute.dtype)
        bounds = data.bounds[:, :2]
        self.prompts = [data.tokens[start:end].tolist() for start, end in bounds]
        *_, (_, sources) = rewards_of(config)
        self.questions = questions_of(config.data, data, sources, reward.takes)
        reward.check(self.questions)
        self.reward = reward if self.rl.eval_rewards is None else reward.load()
        self.seed = int(np.random.SeedSequence([config.seed, 5]).generate_state(1)[0])

    def __call__(self, params: Any, stopping: Callable[[], bool]) -> dict[str, float | None] | None:
        """Metrics of the answers by `params`; None if `stopping` has interrupted it.

        Raises:
            RewardError: the reward is unusable.
        """
        weights = self.sampler.weights(self.setup.trainable.weights(params))
        answers: dict[int, Any] = {}
        for number, answer in self.sampler.answers(weights, self.prompts, seed=self.seed):
            watchdog.beat(f"sampling held-out answer {len(answers) + 1} of {len(self.prompts)}")
            if stopping():
                return None
            answers[number] = answer
        ordered = [answers[number] for number in range(len(answers))]
        texts = [self.setup.template.text(answer.content) for answer in ordered]
        cut = np.array([answer.reason == "length" for answer in ordered], np.float32)
        each = self.reward(self.questions, texts)
        rewards = self.reward.total(each)
        rewards = rewards - np.float32(self.rl.missing_eos_penalty) * cut
        return {
            "eval_reward": float(rewards.mean()),
            "eval_reward_std": float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0,
            "eval_completions/mean_length": float(np.mean([len(a.tokens) for a in ordered])),
            "eval_completions/clipped_ratio": float(cut.mean()),
            **{f"eval_{name}": _mean(values) for name, values in self.reward.logged(each).items()},
        }


def _mean(rewards: np.ndarray) -> float | None:
    """Mean of those that a function gave; None without one."""
    given = rewards[~np.isnan(rewards)]
    return float(given.mean()) if len(given) else None
