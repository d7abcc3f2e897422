"""Reward and toxicity models.

python -m easyaira.train_reward --config configs/aira-reward.yaml
"""

import sys

from easyaira import cli
from easyaira.config.run import TrainReward
from easyaira.in_python import Training

CONFIG, ALGORITHM = TrainReward, "easyaira.algorithms.reward:reward_algorithm"
main = cli.command(CONFIG, ALGORITHM)
sys.modules[__name__].__class__ = Training

if __name__ == "__main__":
    cli.run_command(main)
