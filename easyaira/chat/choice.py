"""The choice among scored answers: best reward first, those below the guard's threshold dropped.

The rule of Aira's demo. It fails closed: an answer whose score is missing or NaN is never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

GUARD_THRESHOLD = 5.0  # of a toxicity model's score, see Aira's demo


def ranking(
    rewards: Sequence[float], guards: Sequence[float] | None, threshold: float = GUARD_THRESHOLD
) -> list[int]:
    """Indices of the answers that may be given, best first; among equal rewards, the earlier one.

    Args:
        rewards: score of each answer, the higher the better.
        guards: score of a toxicity model, higher for harmless texts; None: the guard is off.
        threshold: least score of the guard.

    Raises:
        ValueError: a score is missing.
    """
    scores = zip(rewards, [threshold] * len(rewards) if guards is None else guards, strict=True)
    allowed = [
        i
        for i, (reward, guard) in enumerate(scores)
        if not math.isnan(reward) and guard >= threshold  # false for NaN
    ]
    return sorted(allowed, key=lambda i: -rewards[i])


def choose(
    answers: Sequence[str],
    rewards: Sequence[float],
    guards: Sequence[float] | None,
    apology: str,
    threshold: float = GUARD_THRESHOLD,
) -> str:
    """The first answer of `ranking`, or the apology if there is none."""
    order = ranking(rewards, guards, threshold)
    pairs = list(zip(answers, rewards, strict=True))
    return pairs[order[0]][0] if order else apology
