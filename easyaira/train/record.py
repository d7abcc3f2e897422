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
    """An update whose sums are still on the device.

    Attributes:
        end: time and CPU time of this process at its end.
        compilations: programs compiled so far.
        timed: its program had been compiled before.
    """

    number: int
    ready: Ready
    sums: Sums
    end: Future[tuple[float, float]]
    compilations: int
    timed: bool


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

    def before_step(self, number: int, ready: Ready) -> None:
        """Stop the clock if the update after `number` has to be compiled."""
        if number == self.start:
            self.log.stage("compiling the first update")
        if ready.batch.shape not in self.shapes:
            self.pause()

    def update(self, number: int, ready: Ready, sums: Sums) -> None:
        """Add an update that was dispatched, and fetch the sums of earlier ones.

        Raises:
            NonFiniteError: an earlier update failed.
        """
        timed = ready.batch.shape in self.shapes
        self.shapes.add(ready.batch.shape)
        end = self._clock.submit(_end, sums)
        self.pending.append(Pending(number, ready, sums, end, len(self.shapes), timed))
        self.log.advance(1)
        self._fetch(number - 1)
        if not timed:  # it includes compilation
            self.pause()

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
            update = self.pending.pop(0)
            number, sums = update.number, jax.device_get(update.sums)
            if (failed := int(sums.pop("failed")[0])) >= 0:
                raise NonFiniteError(self._failure(failed))
            self.window.add(sums, update.ready.batch, update.ready.waited, timed=update.timed)
            row = dict(measured or {}) if number == until else {}
            if due(number, self.every, self.until):
                row = self._row(update) | row
            if row:
                self._write(number, row)

    def _write(self, number: int, row: Mapping[str, float | str | None]) -> None:
        self.log.write(number, row)
        self.window.logged = number

    def _row(self, update: Pending) -> dict[str, float | None]:
        row = self.window.take(*update.end.result())
        row |= {
            "learning_rate": float(self.schedule(update.number - 1)),
            "epoch": update.number / len(self.source),
        }
        rate = row["tokens_per_second"]
        row["mfu"] = rate and self.peak and rate * self.flops / self.peak
        row["compilations"] = update.compilations
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


def _end(sums: Sums) -> tuple[float, float]:
    """Time, and CPU time of this process, at which the sums of an update are ready."""
    jax.block_until_ready(sums)
    return time.perf_counter(), time.process_time()
