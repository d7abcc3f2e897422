"""Reward and toxicity models.

python -m easyaira.train_reward --config configs/aira-reward.yaml
"""

from easyaira import cli
from easyaira.config.run import TrainReward

main = cli.command(TrainReward, "easyaira.algorithms.reward:reward_algorithm")

if __name__ == "__main__":
    cli.run_command(main)
