"""Metrics to metrics.jsonl, TensorBoard and the terminal."""

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

from easyaira.errors import StorageError
from easyaira.files import write_file


class Log:
    """Writes metrics.jsonl (one object per logged step), tensorboard/ and lines for the terminal.

    Args:
        folder: the run folder.
        step: the step that the run resumes from; later rows are removed. At step 0, all are.
        total: updates of the whole run.
        unmeasured: the evaluation at `step` will be repeated; its rows are removed, too.

    Raises:
        StorageError: a file cannot be written, here or later.
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
        # tensorboard.summary.Writer stores scalars as tensors, of which TensorBoard's loader keeps
        # 10 by default; scalars as simple_value keep every step
        self._board = EventFileWriter(str(folder / "tensorboard"))
        self._bar = tqdm(
            total=total,
            initial=step,
            desc="training",
            unit=" updates",
            disable=not sys.stderr.isatty(),
        )

    def write(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """Log a row of metrics. TensorBoard does not get text values, such as a kernel's name."""
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
        """Show a line beside the progress bar in a terminal, or print it elsewhere."""
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.set_postfix_str(line.partition(": ")[2])

    def close(self) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # `write` has reported it
            self._file.close()
        with contextlib.suppress(OSError):
            self._board.close()


class NoLog:
    """Log of the processes that do not write."""

    def write(self, step: int, values: Mapping[str, float | str | None]) -> None:
        pass

    def advance(self, steps: int) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, without a last line truncated by a crash."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
