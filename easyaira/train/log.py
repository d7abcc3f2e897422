"""Metrics to metrics.jsonl, trackers and the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from easyaira.errors import StorageError
from easyaira.files import parse_json, read_file, reason, write_file
from easyaira.train.trackers import Trackers

COLUMNS = 80
MAIN = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm"}  # metric: word
DIGITS = {"loss": 4, "lr": 2, "grad norm": 3}
LOSS = {"": {}, "eval_": {"loss": "loss"}}
MORE = {
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "accuracy": "accuracy",
    "auc": "auc",
    "margin": "margin",
    "reward": "reward",
    "objective/kl": "kl of answers",
    "mean_token_accuracy": "token accuracy",
    "router_aux_loss": "balance of experts",
}
MAX_BYTES = 2**29  # of metrics.jsonl: about a million rows


class Log:
    """Writes metrics.jsonl (one object per logged step) and lines for the terminal.

    Args:
        folder: the run folder.
        step: the step that the run resumes from; later rows are removed. At step 0, all are.
        total: updates of the whole run.
        unmeasured: the evaluation at `step` will be repeated; its metrics are removed, too.
        logged: the last step that the run has logged, if it resumes; rows up to it are expected.
        trackers: get the same metrics, other than texts such as a kernel's name.

    Raises:
        StorageError: a file cannot be written, here or later.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        total: int,
        unmeasured: bool,
        logged: int | None = None,
        trackers: Trackers | None = None,
    ):
        self.path = folder / "metrics.jsonl"
        rows, damaged = parse(self.path)
        kept = [row for row in rows if row["step"] <= step] if step else []
        if unmeasured:
            kept = [
                {k: v for k, v in row.items() if row["step"] < step or not k.startswith("eval_")}
                for row in kept
            ]
        last = kept[-1]["step"] if kept else None
        if step and logged is not None and (last is None or last < logged):
            damaged.append(f"rows from {'the start' if last is None else f'update {last}'} on")
        try:
            if damaged:
                self._keep_damaged(damaged)
            self._start(kept)
        except OSError as error:
            raise self._failed(error) from error
        self._trackers = trackers
        self._begun = False
        self._bar = tqdm(
            total=total,
            initial=step,
            desc="starting",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
            disable=not sys.stderr.isatty(),
        )

    def _keep_damaged(self, damaged: list[str]) -> None:
        kept_as = ""
        if self.path.exists():
            self.path.replace(self.path.with_name(f"{self.path.name}.damaged"))
            kept_as = f"; the file is kept as {self.path.name}.damaged"
        lost = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        print(f"warning: {self.path}: lost or unreadable: {lost}{kept_as}", flush=True)

    def _start(self, rows: list[dict[str, Any]]) -> None:
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self.path, "a")
        self._last = rows[-1] if rows else {}

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path}: cannot be written: {reason(error)}")

    def write(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """Log a row of metrics; a second one of a step joins the first."""
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        values = {name: value for name, value in values.items() if name not in texts}
        row = {"step": step} | {
            name: value if value is None or math.isfinite(value) else str(value)
            for name, value in values.items()
        }
        row |= texts
        try:
            if self._last.get("step") == step:  # an evaluation that was interrupted, repeated
                self._file.close()
                self._start([*read(self.path)[:-1], self._last | row])
            else:
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
                self._last = row
        except OSError as error:
            raise self._failed(error) from error
        if self._trackers:
            self._trackers.write(step, values)
        for line in lines(step, self._bar.total, values):
            self.say(line)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Pass texts to the trackers that show texts."""
        if self._trackers:
            self._trackers.texts(step, texts)

    def stage(self, what: str) -> None:
        """Show the current work in the progress bar. Before the first update, also print it."""
        if not self._begun:
            self.say(f"run     {what}")
        self._bar.set_description(what)

    def advance(self, steps: int) -> None:
        if not self._begun:  # so that only updates count for the time left
            self._begun = True
            self._bar.unpause()
        self._bar.set_description("training", refresh=False)
        self._bar.update(steps)

    def say(self, line: str) -> None:
        """Print a line, above the progress bar in a terminal."""
        with tqdm.external_write_mode():
            print(line, flush=True)

    def close(self) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # `write` has reported it
            self._file.close()
        if self._trackers:
            self._trackers.close()


class NoLog:
    """Log of the processes that do not write."""

    def write(self, step: int, values: Mapping[str, float | str | None]) -> None:
        pass

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        pass

    def stage(self, what: str) -> None:
        pass

    def advance(self, steps: int) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


def lines(step: int, total: int, values: Mapping[str, float | str | None]) -> Iterator[str]:
    """A row of metrics for people: in lines of at most 80 columns, as far as names allow."""
    numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
    main = [
        f"{word} {numbers[name]:.{DIGITS[word]}g}" for name, word in MAIN.items() if name in numbers
    ]
    if "tokens_per_second" in numbers:
        main.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
    if "step_time" in numbers and step < total:
        left = round((total - step) * numbers["step_time"])
        main.append(f"{timedelta(seconds=left)} left")
    if main:
        yield f"step {step}: {', '.join(main)}"
    for title, prefix in (("", ""), ("held out: ", "eval_")):
        words = LOSS[prefix] | MORE
        parts = [
            f"{w} {numbers[prefix + n]:.4g}" for n, w in words.items() if prefix + n in numbers
        ]
        if parts:
            text = title + ", ".join(parts)
            yield from textwrap.wrap(
                text,
                COLUMNS,
                initial_indent=" " * 6 if main else f"step {step}: ",
                subsequent_indent=" " * 6,
            )


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, without damaged ones."""
    return parse(path)[0]


def parse(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a metrics.jsonl, and its damaged lines. A last line cut by a crash is not damaged."""
    rows: list[dict[str, Any]] = []
    damaged: list[str] = []
    if not path.exists():
        return rows, damaged
    try:
        *lines, last = read_file(path, MAX_BYTES).split(b"\n")
    except (OSError, ValueError) as error:
        return rows, [reason(error)]
    for number, line in enumerate([*lines, last], 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if _is_row(row):
            rows.append(row)
        elif number <= len(lines) or (line and not b'{"step": '.startswith(line[:9])):
            damaged.append(f"line {number}")
    return rows, damaged


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    return all(value is None or type(value) in (int, float, str) for value in row.values())
