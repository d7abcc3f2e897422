"""Example rewards for `rl.reward`, such as `easyaira.rewards.rules:concise`."""

from __future__ import annotations

from collections.abc import Sequence


def concise(prompts: Sequence[str], completions: Sequence[str], words: int = 30) -> list[float]:
    """1 for an answer of at most `words` words, and less, down to -1, for a longer one."""
    return [max(-1.0, 1 - max(0, len(text.split()) - words) / words) for text in completions]


def one_sentence(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 for an answer that ends with a full stop and has no other; else 0."""
    return [float(text.strip().find(".") == len(text.strip()) - 1 >= 0) for text in completions]
