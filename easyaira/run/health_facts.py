"""Facts that the health checks of a DPO run use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from easyaira.config.run import TrainDPO
from easyaira.run.hacking import PHASE, means
from easyaira.train.optimizer import warmup_steps
from easyaira.train.setup import Setup

FEWEST = 5  # logged updates after the warm-up, before curves are judged


@dataclass(frozen=True)
class Run:
    """Facts about a run.

    Attributes:
        rows: of metrics.jsonl.
        data: of data_report.json.
        beta, batch: dpo.beta, pairs per update.
        warmup, planned: updates of the warm-up, and of the run.
        reference: whether there is a reference model.
    """

    rows: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]
    beta: float = 0.1
    batch: int = 8
    warmup: int = 0
    planned: int = 0
    reference: bool = True

    @cached_property
    def start(self) -> Mapping[str, Any]:
        """Metrics before the first update."""
        return next((row for row in self.rows if row["step"] == 0 and "loss" in row), {})

    @cached_property
    def learned(self) -> list[Mapping[str, Any]]:
        """Rows of updates at the full learning rate; none while they are too few to judge."""
        rows = [
            row
            for row in self.rows
            if row["step"] > self.warmup
            and all(isinstance(row.get(name), int | float) for name in NEEDED)
        ]
        return rows if len(rows) >= FEWEST else []

    @cached_property
    def last(self) -> dict[str, float]:
        """Means over the last fifth of `learned`."""
        return means(self.learned[-max(len(self.learned) // PHASE, FEWEST // 2) :])

    @cached_property
    def late(self) -> dict[str, float]:
        """Means over the second half of `learned`."""
        return means(self.learned[len(self.learned) // 2 :])

    @property
    def half(self) -> bool:
        """At least half of the run is done."""
        return max((row["step"] for row in self.rows), default=-1) >= self.planned / 2

    @cached_property
    def held_out(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if isinstance(row.get("eval_loss"), int | float)]

    @property
    def pairs(self) -> Mapping[str, int]:
        return self.data.get("train", {}).get("answers", {})

    @property
    def tokens(self) -> float:
        """Mean length of a chosen answer."""
        return max(self.pairs.get("chosen tokens", 0) / max(self.pairs.get("pairs", 0), 1), 1)

    @property
    def moved(self) -> float | None:
        """Change of the chosen answers' log-probability, in nats per token."""
        if not self.learned or not self.reference or not self.pairs:
            return None
        return self.last["rewards/chosen"] / self.beta / self.tokens


def of_setup(setup: Setup, rows: Sequence[Mapping[str, Any]]) -> Run | None:
    """Facts about a run on pairs; None for other runs."""
    config = setup.config
    if not isinstance(config, TrainDPO) or config.dpo.unpaired:
        return None
    warmup = warmup_steps(config.optimizer, setup.total_steps)
    compared = config.dpo.reference == "model"
    return Run(
        rows,
        setup.data.report,
        beta=config.dpo.beta,
        batch=config.train_batch_size,
        warmup=warmup,
        planned=setup.total_steps,
        reference=compared,
    )


NEEDED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
