"""Reward and toxicity models.

python -m easyaira.train_reward --config configs/aira-reward.yaml
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from easyaira import cli
from easyaira.config import TrainReward

if TYPE_CHECKING:
    from easyaira.prepare import Algorithm


def reward_algorithm(config: TrainReward) -> Algorithm:
    """Reward modelling as `run` takes it; its task is what the columns of the data are for."""
    from easyaira import objectives
    from easyaira.data.build import recipe_of
    from easyaira.data.dataset import task_of
    from easyaira.prepare import Algorithm, Setup

    def labelled(setup: Setup) -> bool:
        return setup.data.train.answers == 1

    def begin(setup, params, folder, first):
        parts = (setup.batches, setup.held_out)
        known = [{"labels": p.examples.labels} if p and labelled(setup) else {} for p in parts]
        return None, *known, {}

    return Algorithm(
        recipe=lambda max_length: recipe_of(
            task_of(config.data, ("pair", "label")), config.data, max_length
        ),
        loss_fn=lambda setup: objectives.reward(
            setup.model,
            config.reward,
            examples=setup.micro_batch,
            answers=setup.data.train.answers,
        ),
        frozen=lambda setup: None,
        begin=begin,
        scorer=True,
        known=lambda setup: {"labels": ()} if labelled(setup) else {},
        summary=objectives.reward_summary,
    )


def main(argv: list[str]) -> None:
    config, dry_run = cli.parse(TrainReward, argv)

    from easyaira.run import run  # after the command line, so that --help answers at once

    run(config, reward_algorithm(config), dry_run=dry_run)


if __name__ == "__main__":
    cli.run_command(main)
