"""Averages and rates of training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from easyaira.distributed.chips import chip_of

Sums = dict[str, tuple[float, float]]  # name -> (sum, count)


def add(total: Sums, sums: Mapping[str, tuple[Any, Any]]) -> Sums:
    """Add sums and counts, so that an average is never taken of averages."""
    return {
        name: tuple(
            a + float(b) for a, b in zip(total.get(name, (0.0, 0.0)), sums[name], strict=True)
        )
        for name in sums
    }


def averages(sums: Mapping[str, tuple[float, float]], prefix: str = "") -> dict[str, float | None]:
    """Sums divided by their counts; None for nothing counted."""
    return {
        prefix + name: total / max(count, 1) if count else None
        for name, (total, count) in sums.items()
    }


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device; None for kinds without published figures, which get no `mfu`."""
    chip = chip_of(device_kind)
    return chip and chip.flops


class Window:
    """Sums and times since the last logged step.

    Args:
        saved: the result of `to_save`, from the checkpoint that the run resumes from.

    Attributes:
        unmeasured: an evaluation was interrupted and must be repeated.
        logged: the last step with a row in the log; None: unknown.
        best: record of the best evaluation, see best.Best; None: the run looks for none.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None):
        saved = saved or {"sums": {}, "num_tokens": 0}
        self.unmeasured: bool = saved.get("unmeasured", False)
        self.logged: int | None = saved.get("logged")
        self.best: dict[str, Any] | None = saved.get("best")
        self.sums: Sums = {name: tuple(value) for name, value in saved["sums"].items()}
        self.num_tokens: int = saved["num_tokens"]
        self.positions: int = saved.get("positions", 0)  # missing in older records
        self._cpu = time.process_time()
        self._since: float | None = None  # start of the running interval; None while paused
        self._seconds, self._waited, self._steps, self._tokens = 0.0, 0.0, 0, 0

    def to_save(self) -> dict[str, Any]:
        return {
            "sums": self.sums,
            "num_tokens": self.num_tokens,
            "positions": self.positions,
            "unmeasured": self.unmeasured,
            "logged": self.logged,
            "best": self.best,
        }

    @property
    def running(self) -> bool:
        """Whether the clock is running."""
        return self._since is not None

    def run(self) -> None:
        """Start the clock. Compilation, evaluation and saving are not timed."""
        self._since = self._since or time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def _end(self, now: float) -> float:
        """Seconds of this window until `now`, where the next one starts."""
        if self._since is None:
            return self._seconds
        start, self._since = self._since, max(now, self._since)
        return self._seconds + self._since - start

    def add(
        self, sums: Mapping[str, tuple[Any, Any]], batch: Any, waited: float, timed: bool
    ) -> None:
        """Add one update's sums, its batch, and the seconds spent waiting for that batch."""
        padding = (batch.positions - batch.filled, batch.positions)
        self.sums = add(self.sums, {**sums, "padding": padding})
        self.num_tokens += batch.num_tokens
        self.positions += batch.positions
        if timed:
            self._steps += 1
            self._tokens += batch.num_tokens
            self._waited += waited

    def take(self, ended: float, cpu: float) -> dict[str, float | None]:
        """Return averages and rates, and start a new window.

        Args:
            ended, cpu: time.perf_counter() and time.process_time() at the end of the newest update.
        """
        seconds = self._end(ended)
        timed = self._steps > 0 and seconds > 0
        row = averages(self.sums) | {
            "num_tokens": self.num_tokens,
            "positions": self.positions,
            "cpu_time": cpu - self._cpu,
            "tokens_per_second": self._tokens / seconds if timed else None,
            "step_time": seconds / self._steps if timed else None,
            "data_wait": self._waited / seconds if timed else None,
        }
        self.sums, self._seconds, self._waited, self._steps, self._tokens = {}, 0.0, 0.0, 0, 0
        self._cpu = cpu
        return row
