"""Report on the data of a run without training: rows read, kept, dropped, cut and learned.

python -m easyaira.inspect --config configs/aira-2-124m.yaml --data.max_examples 1000

Takes the configuration of any training command, writes data_report.json and data_report.html into
output_dir, unless a run is there, and prints a few rows with coloured tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from easyaira import cli
from easyaira.config.algorithms import RewardConfig, SFTConfig
from easyaira.config.dpo import DPOConfig
from easyaira.config.model import PolicyConfig
from easyaira.config.rl import RLConfig
from easyaira.config.run import RunConfig
from easyaira.errors import ConfigError, StorageError, escaped

if TYPE_CHECKING:
    from easyaira.data.recipe import Recipe

ROWS = 4  # printed


@dataclass(frozen=True, kw_only=True)
class Inspect(RunConfig):
    """Report on the data that a run would train on, and print a few rows in colour."""

    model: PolicyConfig
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rl: RLConfig | None = None
    task: Literal["auto", "sft", "dpo", "kto", "label"] = "auto"
    """Interpretation of the rows: conversations, pairs of answers, rated answers (kto), or labelled
    texts. auto: by the columns."""


def recipe_of(config: Inspect, max_length: int) -> Recipe:
    """How the training command would tokenise a row.

    Raises:
        ConfigError: --task beside rl.
        DataError: the columns do not decide the task.
    """
    from easyaira.data import columns, dataset, recipe

    if config.rl is not None:
        if config.task != "auto":
            raise ConfigError("--task: rows of an rl configuration are prompts; leave it out")
        from easyaira.algorithms.rollouts import prompts_of

        return prompts_of(config.data, config.rl, max_length)
    if config.task == "auto":
        task = dataset.task_of(config.data, list(columns.FORMS), "set --task, or ")
    else:
        names = {"sft": "conversation", "dpo": "pair", "kto": "rated", "label": "label"}
        task = names[config.task]
    return recipe.recipe_of(task, config.data, max_length, config.sft, compared=config.dpo.compared)


def main(argv: list[str]) -> None:
    config, dry_run = cli.parse(Inspect, argv)
    if dry_run:
        raise ConfigError("--dry_run: inspect trains nothing; give it to the training command")

    from easyaira.data import report
    from easyaira.distributed import mesh as meshes
    from easyaira.train.resolve import find
    from easyaira.train.setup import read_data

    resolved = find(config, meshes.make_mesh("fsdp=-1"), planned=True)  # without weights
    data = read_data(config, resolved, recipe_of(config, resolved.max_length))
    folder = Path(config.output_dir)
    of_run = (folder / "config.yaml").exists()  # keep the report of the rows it was trained on
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not of_run:
            report.write(folder, data)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}; set output_dir") from error
    use = "not used" if config.rl is None else "read by reward functions only"
    for name, account in data.accounts.items():
        print(f"\n{name}: {escaped(account.summary())}")
        for source, count in data.report[name].get("examples by source", {}).items():
            print(f"  {count:,} examples of source {escaped(source)}")
        for noted, count in account.noted.items():
            print(f"  {count:,} {noted}")
        for unread, count in account.unread.items():
            print(f"  {count:,} {escaped(unread)} filled and {use}")
        print(f"  {_size(data.report[name])}")
        print(report.terminal(account, part=name, rows=ROWS, colour=sys.stdout.isatty()))
    if not sys.stdout.isatty():
        print("\ntokens in [brackets] are trained on")
    if of_run:
        print(f"\nkept    the report of the run in {folder}; to write this one, set output_dir")
    else:
        print(f"\ndone    {folder / report.FILES[1]}")


def _size(part: Mapping[str, Any]) -> str:
    """Tokens of a part of the data, and lengths of its examples."""
    length = part["length"]
    return (
        f"{part['tokens']:,} tokens, {part['learned_tokens']:,} of them learned; examples of "
        f"{length['shortest']:,} to {length['longest']:,} tokens, half of them up to "
        f"{length['median']:,} and 95 % up to {length['95 %']:,}"
    )


if __name__ == "__main__":
    cli.run_command(main)
