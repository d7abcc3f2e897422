"""Fetches the metrics of updates from the device and logs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from easyaira.errors import NonFiniteError
from easyaira.train.evaluation import Evaluation
from easyaira.train.loader import Ready
from easyaira.train.log import Log, NoLog
from easyaira.train.metrics import Window
from easyaira.train.saving import due
from easyaira.train.step import Sums


class Pending(NamedTuple):
    """An update whose sums are still on the device, and the time of its end."""

    number: int
    ready: Ready
    sums: Sums
    end: Future[float]


class Record:
    """Fetches sums one update late, so that the device never waits for the host.

    Args:
        window: sums since the last logged update.
        source: where batches come from, see loader.Stored.
        facts: metrics logged before the first update.
        schedule: learning rate by update.
        flops: FLOPs of an update per real token.
        peak: FLOP/s of all devices; None: unknown, and so is `mfu`.
        latest: returns the newest checkpoint's step, for the error of a failed update.
        evaluated: called after an evaluation is logged.
    """

    def __init__(
        self,
        log: Log | NoLog,
        window: Window,
        source: Any,
        *,
        start: int,
        every: int,
        until: int,
        facts: Mapping[str, float | str],
        schedule: Callable[[int], np.float32],
        flops: float,
        peak: float | None,
        latest: Callable[[], int | None],
        evaluated: Callable[[], None] = lambda: None,
    ):
        self.log, self.window, self.source = log, window, source
        self.start, self.every, self.until = start, every, until
        self.facts, self.schedule, self.flops, self.peak = facts, schedule, flops, peak
        self.latest, self.evaluated = latest, evaluated
        self.shapes: set[Any] = set()  # compiled so far, by shape of the rows
        self.pending: list[Pending] = []
        # A GPU queues a limited number of operations, so dispatching the next update returns when
        # that update has nearly ended. A separate thread therefore notes when each update ends.
        self._clock = ThreadPoolExecutor(1)

    def wants_evaluation(self, number: int) -> bool:
        """True before the first update, and if the run was stopped during an evaluation."""
        return number == 0 or self.window.unmeasured

    def before(self, number: int, evaluation: Evaluation) -> None:
        """Log the facts and the evaluation before this process's first update."""
        self.window.unmeasured = False
        if row := {**self.facts, **evaluation.metrics}:
            self._write(number, row)
        self.evaluated()

    def compiling(self, number: int) -> None:
        """Say that the update after `number` has to be compiled, if it is the first."""
        if number == self.start:
            self.log.stage("compiling the first update")

    def update(self, number: int, ready: Ready, sums: Sums) -> None:
        """Add an update that was dispatched, and fetch the sums of earlier ones.

        Raises:
            NonFiniteError: an earlier update failed.
        """
        self.shapes.add(ready.batch.shape)
        self.pending.append(Pending(number, ready, sums, self._clock.submit(_end, sums)))
        self.log.advance(1)
        self._fetch(number - 1)
        if number == self.start + 1:
            self.pause()  # the first update includes compilation

    def pause(self) -> None:
        """Wait for the device, and stop the clock until `resume`."""
        if self.pending:
            jax.block_until_ready(self.pending[-1].sums)
        self.window.pause()

    def resume(self) -> None:
        if not self.window.running:
            self._fetch(self.until)
            self.window.run()

    def evaluation(self, number: int, evaluation: Evaluation) -> None:
        """Log held-out metrics after an update."""
        self.window.unmeasured = not evaluation.complete
        self._fetch(number, evaluation.metrics)
        self.evaluated()

    def to_save(self) -> dict[str, Any]:
        """State of the window after the newest update, for its checkpoint."""
        self.pause()
        self._fetch(self.until)
        return self.window.to_save()

    def _fetch(self, until: int, measured: Mapping[str, float | None] | None = None) -> None:
        """Fetch the sums of updates up to `until`, and write the rows that are due."""
        while self.pending and self.pending[0].number <= until:
            number, ready, sums, end = self.pending.pop(0)
            sums, ended = jax.device_get(sums), end.result()
            if (failed := int(sums.pop("failed")[0])) >= 0:
                raise NonFiniteError(self._failure(failed))
            timed = number > self.start + 1
            self.window.add(sums, ready.batch, ready.waited, timed=timed)
            row = dict(measured or {}) if number == until else {}
            if due(number, self.every, self.until):
                row = self._row(number, ended) | row
            if row:
                self._write(number, row)

    def _write(self, number: int, row: Mapping[str, float | str | None]) -> None:
        self.log.write(number, row)
        self.window.logged = number

    def _row(self, number: int, ended: float) -> dict[str, float | None]:
        row = self.window.take(ended)
        row |= {
            "learning_rate": float(self.schedule(number - 1)),
            "epoch": number / len(self.source),
        }
        rate = row["tokens_per_second"]
        row["mfu"] = rate and self.peak and rate * self.flops / self.peak
        row["compilations"] = len(self.shapes)
        return row

    def _failure(self, failed: int) -> str:
        rows = self.source.rows(failed)
        kept = self.latest()
        where = "there is no checkpoint yet" if kept is None else f"checkpoint {kept} precedes it"
        return (
            f"update {failed + 1}: loss or gradient is not finite (rows {rows[:16].tolist()} of "
            f"the data, counted from 0). The parameters are unchanged; {where}. A smaller "
            "optimizer.learning_rate or model.dtype float32 usually helps"
        )


def _end(sums: Sums) -> float:
    """Time at which the sums of an update are ready."""
    jax.block_until_ready(sums)
    return time.perf_counter()
