"""Results of evaluations: a JSON file for each in the folder of the model, tables of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from easyaira.errors import ConfigError, StorageError, escaped
from easyaira.evaluation.rewardbench import sections
from easyaira.files import read_json, reason, write_file

FOLDER = "evaluation"
METRICS = ("acc_norm", "acc", "exact_match", "accuracy")  # tables show the first that a task has


@dataclass(frozen=True)
class Result:
    """Result of one task, or of one file of rows.

    Attributes:
        task: name of the task, or of the file.
        metric: the one that tables show.
        metrics: all of them.
        better: higher or lower, for `metric`.
        stderr: standard error of the mean of `metric`, where it is a mean over examples.
        examples: questions, pairs or texts.
        num_fewshot: examples in each prompt; None for rows.
        limit: the number of questions that was asked for; None: all.
        truncated: requests, or rows, that were cut to the model's positions.
        left_out: rows that do not count, by reason.
        data: hub id, or name of the file.
        place: hash of the file's path, or of the hub id, and the split (see `digest`).
        content: hash of the questions or rows, in order.
        groups: value of a column -> examples and accuracy.
        step: updates of the checkpoint; None for a Hugging Face folder.
        dtype: computing precision.
        versions: of the programs and of the task.
    """

    task: str
    metric: str
    metrics: Mapping[str, float]
    better: str
    examples: int
    data: str
    dtype: str
    stderr: float | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    truncated: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    step: int | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    place: str | None = None
    content: str | None = None

    @property
    def value(self) -> float:
        return self.metrics[self.metric]

    @property
    def is_share(self) -> bool:
        """A share is shown in percent and counts in averages."""
        return self.better == "higher" and 0 <= self.value <= 1

    @property
    def shown(self) -> str:
        return f"{100 * self.value:.2f}" if self.is_share else f"{self.value:.4g}"

    @property
    def shown_stderr(self) -> str:
        if self.stderr is None:
            return ""
        return f"{100 * self.stderr:.2f}" if self.is_share else f"{self.stderr:.2g}"

    @property
    def label(self) -> str:
        return self.task + (f", {self.num_fewshot}-shot" if self.num_fewshot else "")

    @property
    def file(self) -> str:
        return file_of(self.task, self.num_fewshot)


def file_of(task: str, num_fewshot: int | None = None) -> str:
    """Name of a result's file."""
    name = re.sub(r"[^\w.-]+", "-", task)
    shots = "" if num_fewshot is None else f"-{num_fewshot}"
    return f"{name}{shots}.json"


def digest(*parts: str) -> str:
    """Hash of texts in order, in 16 characters."""
    return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def check_folder(folder: Path) -> None:
    """Check that results can be written, before they are computed.

    Raises:
        StorageError: the folder, or where it would be made, is no folder that can be written to.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise StorageError(f"{folder}: {place} is not a folder; set --output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: {place} cannot be written to; set --output")


def check_earlier(path: Path, limit: int | None, place: str | None) -> None:
    """Check that a result of this limit and place may replace one at `path`.

    Raises:
        ConfigError: the earlier one is of all questions, and this one is not; or it is of other
            rows whose file has the same name; or it is damaged.
    """
    if not path.exists():
        return
    earlier = read_json(path, hint="; remove it, or set --output")
    if limit is not None and earlier.get("limit") is None:
        raise ConfigError(
            f"--limit: {path} is of all questions and would be replaced; set --output"
        )
    if place and earlier.get("place") not in (None, place):
        raise ConfigError(
            f"{path}: is of other rows of this name and would be replaced; set --output"
        )


def write(folder: Path, result: Result) -> Path:
    """Write a result; it replaces an earlier one of the same task and shots.

    Raises:
        ConfigError: see `check_earlier`.
        StorageError: it cannot be written.
    """
    path = folder / result.file
    check_earlier(path, result.limit, result.place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {reason(error)}; set --output") from error
    return path


def read(folder: Path) -> list[Result]:
    """The results in a folder, by task.

    Raises:
        ConfigError: a file is damaged, or no result.
    """
    known = {f.name for f in fields(Result)}
    results = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        try:
            result = Result(**{key: value for key, value in content.items() if key in known})
            _ = result.shown
            if not isinstance(result.content, str | None):
                raise TypeError
        except (TypeError, KeyError) as error:
            raise ConfigError(f"{path}: is not a result of easyaira evaluate; remove it") from error
        results.append(result)
    return results


def average(results: Iterable[Result]) -> float | None:
    """Mean of the shares in percent, from unrounded values; None if there is none."""
    shares = [100 * result.value for result in results if result.is_share]
    return sum(shares) / len(shares) if shares else None


def table(results: Sequence[Result]) -> str:
    """Results of one model, with their average."""
    head = ["task", "metric", "value", "+-", "examples", "truncated"]
    rows = [
        [
            escaped(result.label),
            result.metric,
            result.shown,
            result.shown_stderr,
            f"{result.examples:,}",
            f"{result.truncated:,}",
        ]
        for result in results
    ]
    mean = average(results)
    if mean is not None and len(results) > 1:
        rows.append(["average", "", f"{mean:.2f}", "", "", ""])
    return aligned([head, *rows])


def groups_table(result: Result) -> str:
    """Accuracy of each group of a result, and of the sections of RewardBench."""
    rows = [
        [escaped(name), f"{100 * of['accuracy']:.2f}", f"{of['examples']:,}"]
        for name, of in result.groups.items()
    ]
    rows += [[name, f"{100 * x:.2f}", ""] for name, x in sections(result.groups).items()]
    return aligned([["group", "accuracy", "examples"], *rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def compare(models: Mapping[str, Sequence[Result]]) -> str:
    """A Markdown table of models and tasks, the best of a column in bold.

    Results stand in one column if task, shots and the questions or rows are the same. An average
    is over the shares that a model has.
    """
    columns: dict[tuple, str] = {}
    for results in models.values():
        for result in results:
            columns.setdefault(_key(result), result.label)
    heads = list(columns.values())
    for i, name in enumerate(("n={}", "rows {:.4}")):  # until no two columns have one name
        heads = [
            f"{head}, {name.format(key[2 + i])}" if heads.count(head) > 1 else head
            for head, key in zip(heads, columns, strict=True)
        ]
    values: dict[str, list[float | None]] = {}
    texts: dict[str, list[str]] = {}
    lower = [False] * (len(columns) + 1)
    for name, results in models.items():
        of = {_key(result): result for result in results}
        mean = average(results)
        values[name], texts[name] = [mean], ["-" if mean is None else f"{mean:.2f}"]
        for i, key in enumerate(columns, 1):
            result = of.get(key)
            values[name].append(None if result is None else result.value)
            texts[name].append("-" if result is None else result.shown)
            lower[i] |= result is not None and result.better == "lower"
    lines = [["model", "average", *heads], ["---"] + ["---:"] * (len(columns) + 1)]
    for name in models:
        cells = []
        for i, text in enumerate(texts[name]):
            present = [x for of in values.values() if (x := of[i]) is not None and isfinite(x)]
            best = present and values[name][i] == (min if lower[i] else max)(present)
            cells.append(f"**{text}**" if best and len(models) > 1 else text)
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(escaped(cell) for cell in line)} |" for line in lines)


def _key(result: Result) -> tuple[str, int | None, int, str]:
    return result.task, result.num_fewshot, result.examples, result.content or "?"
