"""On-policy training with rewards.

python -m easyaira.train_rl --model.name_or_path runs/aira --data.train in.jsonl --rl.reward r.py:f
"""

import sys

from easyaira import cli
from easyaira.config.run import TrainRL
from easyaira.in_python import Training

TORCH = True  # a reward function may use it
CONFIG, ALGORITHM = TrainRL, "easyaira.algorithms.rollouts:rl_algorithm"
main = cli.command(CONFIG, ALGORITHM)
sys.modules[__name__].__class__ = Training

if __name__ == "__main__":
    cli.run_command(main, torch=TORCH)
