"""What a run says about itself: averages, metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from easyaira.chips import chip_of
from easyaira.errors import StorageError
from easyaira.files import write_file

Sums = dict[str, tuple[float, float]]  # name -> (sum, count)


def add(total: Sums, more: Mapping[str, tuple[Any, Any]]) -> Sums:
    """Sums and counts added up, so that no average is ever one of averages."""
    return {
        name: tuple(
            a + float(b) for a, b in zip(total.get(name, (0.0, 0.0)), more[name], strict=True)
        )
        for name in more
    }


def averages(sums: Mapping[str, tuple[float, float]], prefix: str = "") -> dict[str, float]:
    return {prefix + name: total / max(count, 1) for name, (total, count) in sums.items()}


def peak_flops(device_kind: str) -> float | None:
    """Of a device whose kind is in the table; others have no `mfu`."""
    chip = chip_of(device_kind)
    return chip and chip.flops


class Window:
    """What has happened since the last logged step.

    Args:
        saved: what `to_save` gave when the run was stopped.

    Attributes:
        unmeasured: the run was stopped while it evaluated, which is to be made good.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None):
        saved = saved or {"sums": {}, "num_tokens": 0}
        self.unmeasured: bool = saved.get("unmeasured", False)
        self.sums: Sums = {name: tuple(value) for name, value in saved["sums"].items()}
        self.num_tokens: int = saved["num_tokens"]
        self._since: float | None = None  # time counts from here; None while it does not
        self._seconds, self._waited, self._steps, self._tokens = 0.0, 0.0, 0, 0

    def to_save(self) -> dict[str, Any]:
        return {
            "sums": self.sums,
            "num_tokens": self.num_tokens,
            "unmeasured": self.unmeasured,
        }

    def run(self) -> None:
        """Let time count: not while the first update compiles, nor in evaluation and saving."""
        self._since = self._since or time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def add(
        self, sums: Mapping[str, tuple[Any, Any]], batch: Any, waited: float, timed: bool
    ) -> None:
        """One update's sums, its batch, and the seconds that were waited for that."""
        padding = (batch.positions - batch.filled, batch.positions)
        self.sums = add(self.sums, {**sums, "padding": padding})
        self.num_tokens += batch.num_tokens
        if timed:
            self._steps += 1
            self._tokens += batch.num_tokens
            self._waited += waited

    def take(self) -> dict[str, float | None]:
        """Averages and rates; a new window begins."""
        running = self._since is not None
        self.pause()
        timed = self._steps > 0 and self._seconds > 0
        row = averages(self.sums) | {
            "num_tokens": self.num_tokens,
            "tokens_per_second": self._tokens / self._seconds if timed else None,
            "step_time": self._seconds / self._steps if timed else None,
            "data_wait": self._waited / self._seconds if timed else None,
        }
        self.sums, self._seconds, self._waited, self._steps, self._tokens = {}, 0.0, 0.0, 0, 0
        if running:
            self.run()
        return row


class Log:
    """Metrics to metrics.jsonl and tensorboard/, one object a logged step, and a line to look at.

    Args:
        folder: the run folder.
        step: the step that a run continues from; what was logged after it is taken back.
        total: updates of the whole run.
        unmeasured: the evaluation at `step` is made again, so what was logged of it is taken back;
            of step 0, everything is.

    Raises:
        StorageError: it cannot be written, here or later.
    """

    def __init__(self, folder: Path, step: int, total: int, unmeasured: bool):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= step]
        if step == 0:
            kept = []
        if unmeasured:
            kept = [r for r in kept if r["step"] < step or not any("eval_" in key for key in r)]
        try:
            write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = open(self.path, "a")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error}") from error
        self._board = EventFileWriter(str(folder / "tensorboard"))
        self._bar = tqdm(
            total=total,
            initial=step,
            desc="training",
            unit=" updates",
            disable=not sys.stderr.isatty(),
        )

    def write(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """A row of metrics. Text, such as a kernel's name, is left out of tensorboard."""
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        values = {name: value for name, value in values.items() if name not in texts}
        row = {"step": step} | {
            name: value if value is None or math.isfinite(value) else str(value)
            for name, value in values.items()
        }
        row |= texts
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error}") from error
        scalars = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if value is not None
        ]
        event = self._event(step=step, wall_time=time.time(), summary=self._summary(value=scalars))
        self._board.add_event(event)
        shown = (
            "loss",
            "tokens_per_second",
            "eval_loss",
            "eval_rewards/accuracies",
            "rewards/margins",
            "eval_accuracy",
            "eval_auc",
        )
        self.say(
            f"step {step}: "
            + ", ".join(
                f"{name} {values[name]:.4g}" for name in shown if values.get(name) is not None
            )
        )

    def advance(self, steps: int) -> None:
        self._bar.update(steps)

    def say(self, line: str) -> None:
        """Beside the progress bar in a terminal, and a plain line elsewhere."""
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.set_postfix_str(line.partition(": ")[2])

    def close(self) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # told by `write`
            self._file.close()
        with contextlib.suppress(OSError):
            self._board.close()


class NoLog:
    """Of the processes that do not write."""

    def write(self, step: int, values: Mapping[str, float | str | None]) -> None:
        pass

    def advance(self, steps: int) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
