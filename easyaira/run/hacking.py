"""Signs of reward hacking: the reward rises, but other metrics show that answers do not improve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from easyaira.algorithms.rollouts import COMPLETIONS

PHASE = 5  # the first and the last fifth of a run are compared
FEWEST = 5  # rows with a reward


class Limits(NamedTuple):
    """Thresholds above which a change is a sign.

    Attributes:
        rise: of the reward, in standard deviations of the first answers' rewards. A smaller one may
            be chance.
        entropy: share of the first entropy that is left. With less, few tokens are uncertain and
            answers repeat each other.
        length: of the last answers, relative to the first.
        divergence: from the reference, in nats per token. Runs whose answers stay readable end
            below 0.2.
        fall: of the held-out reward from its highest, in standard deviations of the first held-out
            answers' rewards: as much as the reward must rise.
        errors: least fall in standard errors of the difference of two means over the held-out
            prompts. With three, chance alone is below 1 in 700 per evaluation.
        cut: share of answers that were cut, with an increase of at least `cut_more`.
    """

    rise: float = 0.5
    entropy: float = 0.3
    length: float = 1.5
    divergence: float = 0.5
    fall: float = 0.5
    errors: float = 3.0
    cut: float = 0.5
    cut_more: float = 0.2


LIMITS = Limits()


def warnings(
    rows: Sequence[Mapping[str, Any]], limits: Limits = LIMITS, prompts: int = 1
) -> dict[str, str]:
    """Metric -> sentence with the evidence of its sign and what to try; empty while the reward does
    not rise.

    Args:
        rows: of the metrics.jsonl of an on-policy run.
        prompts: that are held out.
    """
    evaluated = [row for row in rows if isinstance(row.get("eval_reward"), int | float)]
    rows = [row for row in rows if isinstance(row.get("reward"), int | float)]
    if len(rows) < FEWEST:
        return {}
    size = max(len(rows) // PHASE, 1)
    first, last = (means(part) for part in (rows[:size], rows[-size:]))
    if last["reward"] - first["reward"] <= limits.rise * first.get("reward_std", 0.0):
        return {}
    begin = f"The reward rose from {first['reward']:.3g} to {last['reward']:.3g}"
    end = f"read {COMPLETIONS} before you trust the reward"
    signs = [*_held_out(evaluated, limits, prompts), *_signs(first, last, limits)]
    return {metric: f"{begin}, but {sign}; {end}" for metric, sign in signs}


def _held_out(
    rows: Sequence[Mapping[str, Any]], limits: Limits, prompts: int
) -> Iterator[tuple[str, str]]:
    if len(rows) < 2:
        return
    best, last = max(rows, key=lambda row: row["eval_reward"]), rows[-1]
    least = max(limits.fall, limits.errors * math.sqrt(2 / prompts))
    if best["eval_reward"] - last["eval_reward"] > least * rows[0].get("eval_reward_std", 0.0):
        yield (
            "eval_reward",
            (
                f"that of held-out prompts fell from {best['eval_reward']:.3g} after update "
                f"{best['step']} to {last['eval_reward']:.3g}: stop there (load_best_model_at_end, "
                "metric_for_best_model reward), raise rl.beta, or add prompts"
            ),
        )


def _signs(
    first: dict[str, float], last: dict[str, float], limits: Limits
) -> Iterator[tuple[str, str]]:
    entropy, length = "entropy", "completions/mean_length"
    cut, divergence = "completions/clipped_ratio", "objective/kl"
    if entropy in last and last[entropy] < limits.entropy * first[entropy]:
        yield (
            entropy,
            (
                f"entropy fell from {first[entropy]:.2g} to {last[entropy]:.2g} nats a token, so "
                "answers resemble each other: raise rl.beta or lower optimizer.learning_rate"
            ),
        )
    if length in last and last[length] >= limits.length * first[length]:
        yield (
            length,
            (
                f"answers grew from {first[length]:.0f} to {last[length]:.0f} tokens: check that "
                "the reward does not grow with the length"
            ),
        )
    if length in last and last.get(divergence, 0.0) > limits.divergence * last[length]:
        yield (
            divergence,
            (
                f"the model is {last[divergence] / last[length]:.2g} nats a token away from its "
                "reference: raise rl.beta or lower optimizer.learning_rate"
            ),
        )
    if cut in last and last[cut] >= max(limits.cut, first[cut] + limits.cut_more):
        yield (
            cut,
            (
                f"{last[cut]:.0%} of the answers are cut, {first[cut]:.0%} at first: raise "
                "rl.max_completion_length or set rl.missing_eos_penalty"
            ),
        )


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each number over the rows that have it."""
    numbers: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float):
                numbers.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in numbers.items()}
