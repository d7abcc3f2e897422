"""The records of a run that its release quotes: model card and proof are written from them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from easyaira.config.run import PROVENANCE
from easyaira.data import report as data_report
from easyaira.errors import ConfigError, DataError
from easyaira.evaluation import results
from easyaira.files import read_json, read_yaml
from easyaira.train import energy, log

ALGORITHMS = ("dpo", "reward", "sft", "rl")  # groups of options, one of which a run has


@dataclass(frozen=True)
class Records:
    """A run folder's records of the training behind one of its checkpoints; read on demand.

    Attributes:
        folder: the run folder.
        step: updates of the checkpoint. Later rows of metrics.jsonl are of other weights.
    """

    folder: Path
    step: int

    @property
    def trained(self) -> bool:
        """False for a folder that `convert from_hf` wrote."""
        return (self.folder / "config.yaml").exists()

    def check(self) -> None:
        """Read the records that a release cannot do without.

        Raises:
            ConfigError: config.yaml is damaged.
        """
        if self.trained:
            _ = self.config

    @cached_property
    def config(self) -> dict[str, Any]:
        """Options and provenance of the run.

        Raises:
            ConfigError: config.yaml is damaged.
        """
        file = self.folder / "config.yaml"
        config = read_yaml(file)
        if PROVENANCE not in config or not {*ALGORITHMS} & config.keys():
            raise ConfigError(
                f"{file}: is cut or not of a run; run the training command again, which writes it"
            )
        return config

    @cached_property
    def algorithm(self) -> str:
        return next(name for name in ALGORITHMS if name in self.config)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl up to the checkpoint."""
        rows = log.read(self.folder / "metrics.jsonl")
        return [row for row in rows if row["step"] <= self.step]

    @property
    def metrics_end(self) -> int | None:
        """Update at which a damaged metrics.jsonl ends before the checkpoint, or None."""
        end = self.rows[-1]["step"] if self.rows else 0
        return end if self.step - end >= self.config["logging_steps"] else None

    @cached_property
    def last(self) -> dict[str, Any]:
        """Newest value of each metric; none if the newest rows are lost."""
        last: dict[str, Any] = {}
        for row in self.rows if self.metrics_end is None else ():
            last |= row
        return last

    @cached_property
    def held_out(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rows of the evaluation before training, and of the newest one; empty if there is none."""
        rows = [row for row in self.rows if any(name.startswith("eval_") for name in row)]
        if not rows or self.metrics_end is not None:
            return {}, {}
        return (rows[0] if rows[0]["step"] == 0 else {}), rows[-1]

    @cached_property
    def data(self) -> dict[str, Any] | None:
        """Content of data_report.json; None, with a line in the log, if it is damaged."""
        try:
            return read_json(self.folder / data_report.FILES[0], error=DataError)
        except DataError as error:
            print(f"card    {error}; facts of the data are left out", flush=True)
            return None

    @cached_property
    def evaluations(self) -> list[results.Result]:
        """Complete results of these weights; none, with a line in the log, if one is damaged."""
        try:
            evaluations = results.read(self.folder / results.FOLDER)
        except ConfigError as error:
            print(f"card    {error}; results of evaluations are left out", flush=True)
            return []
        return [one for one in evaluations if one.step == self.step and one.limit is None]

    @cached_property
    def energy(self) -> energy.Used | None:
        return energy.used(self.folder)

    def sources(self) -> list[tuple[str, bool, str]]:
        """Public name, whether it is on the hub, and split of each data source."""
        data = self.config["data"]
        train = data["train"]
        if isinstance(train, str):
            train = [{"path": train, "split": data["split"]}]
        return [(public(s["path"]), on_hub(s["path"]), s["split"]) for s in train]


def on_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def public(name: str) -> str:
    """A hub id as it is; a file or folder by its own name, since the path to it is private."""
    return name if on_hub(name) else Path(name).name
