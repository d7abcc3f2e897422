"""Supervised fine-tuning.

python -m easyaira.train_sft --config configs/aira-2-124m.yaml --mesh dp=1,fsdp=-1,tp=1
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from easyaira import cli
from easyaira.config import TrainSFT

if TYPE_CHECKING:
    from easyaira.prepare import Algorithm


def sft_algorithm(config: TrainSFT) -> Algorithm:
    """SFT as `run` takes it."""
    from easyaira import objectives
    from easyaira.data.build import recipe_of
    from easyaira.prepare import Algorithm

    return Algorithm(
        recipe=lambda max_length: recipe_of("conversation", config.data, max_length, config.sft),
        loss_fn=lambda setup: objectives.sft(setup.model),
        frozen=lambda setup: None,
        begin=lambda setup, params, folder, first: (None, {}, {}, {}),
    )


def main(argv: list[str]) -> None:
    config, dry_run = cli.parse(TrainSFT, argv)

    from easyaira.run import run  # after the command line, so that --help answers at once

    run(config, sft_algorithm(config), dry_run=dry_run)


if __name__ == "__main__":
    cli.run_command(main)
