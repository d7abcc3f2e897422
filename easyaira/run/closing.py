"""The lines that end a run: what it changed, how long it took, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from easyaira.train.energy import Used

MEASURES = {  # metric: words
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "held-out reward accuracy",
    "eval_accuracy": "held-out accuracy",
    "eval_mean_token_accuracy": "held-out token accuracy",
    "eval_reward": "held-out reward of answers",
    "reward": "reward of answers",
    "loss": "loss",
}
SHOWN = 2


def lines(
    rows: Sequence[Mapping[str, Any]],
    seconds: float,
    used: Used | None,
    folder: str,
    scorer: bool,
    warnings: Iterable[str] = (),
) -> Iterator[str]:
    """Closing lines of a run.

    Args:
        rows: of metrics.jsonl.
        seconds: duration of this command.
        used: energy of all commands of the run; None: not tracked.
        scorer: the model scores texts, and so cannot generate; FILE has pairs or labelled texts.
        warnings: lines to show before the last one.
    """
    parts = [f"{words} {change}" for words, change in measured(rows)]
    parts.append(str(timedelta(seconds=round(seconds))))
    if used is not None:
        parts.append(f"{used.kwh:.2g} kWh")
    yield f"after   {', '.join(parts)}"
    yield from warnings
    command = "evaluate {} --rows FILE" if scorer else "generate {} --chat"
    yield f"next    easyaira {command.format(shlex.quote(folder))}"


def measured(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Words and change of the first metrics that were measured twice."""
    changes = []
    for name, words in MEASURES.items():
        values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        if len(values) > 1:
            changes.append((words, f"{values[0]:.4g} -> {values[-1]:.4g}"))
    return changes[:SHOWN]
