"""The best held-out metric so far, and stopping when it no longer improves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from easyaira.config.run import RunConfig
from easyaira.errors import ConfigError, did_you_mean
from easyaira.train.metrics import Window


class Best:
    """Follows a metric from evaluation to evaluation, as transformers' Trainer does with
    load_best_model_at_end, metric_for_best_model and EarlyStoppingCallback.

    Its state is a record in the window, which every checkpoint holds: `step` and `value` of the
    best evaluation (None before the first), and the number of evaluations since, `waited`.

    Args:
        keep: called with the step of a new best, whose checkpoint must then be kept.

    Attributes:
        improved: the newest evaluation is the best so far, so its parameters are to be saved.
    """

    def __init__(self, config: RunConfig, window: Window, keep: Callable[[int], None]):
        self.wanted, self.patience = config.load_best_model_at_end, config.early_stopping_patience
        name = config.metric_for_best_model or config.default_metric
        self.name = f"eval_{name.removeprefix('eval_')}"
        greater = config.greater_is_better
        self.greater = not self.name.endswith("loss") if greater is None else greater
        self.window, self.keep, self.improved = window, keep, False
        if self.wanted and window.best is None:
            window.best = {"step": None, "value": None, "waited": 0}
        if self.step is not None:
            keep(self.step)

    @property
    def record(self) -> dict[str, Any]:
        return self.window.best or {"step": None, "value": None, "waited": 0}

    @property
    def step(self) -> int | None:
        return self.record["step"]

    @property
    def exhausted(self) -> bool:
        """The metric has not improved for `patience` evaluations."""
        return self.patience is not None and self.record["waited"] >= self.patience

    def look(self, number: int, measured: dict[str, float | None]) -> None:
        """Compare the metrics of an evaluation with the best. Update 0 has no checkpoint, so its
        metrics are only checked for the name.

        Raises:
            ConfigError: the metric is not among those of the evaluation.
        """
        self.improved = False
        if not self.wanted:
            return
        value = measured.get(self.name)
        if value is None:
            near = did_you_mean(self.name, measured)
            raise ConfigError(
                f"metric_for_best_model: {self.name} is none of the metrics, "
                f"{', '.join(measured)}{near}"
            )
        if number == 0:
            return
        before = self.record["value"]
        sign = 1 if self.greater else -1
        if value == value and (before is None or sign * value > sign * before):  # not NaN
            self.window.best = {"step": number, "value": value, "waited": 0}
            self.improved = True
            self.keep(number)
        else:
            self.window.best = self.record | {"waited": self.record["waited"] + 1}
