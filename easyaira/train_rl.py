"""On-policy training with rewards.

python -m easyaira.train_rl --model.name_or_path runs/aira --data.train in.jsonl --rl.reward r.py:f
"""

from easyaira import cli
from easyaira.config.run import TrainRL

main = cli.command(TrainRL, "easyaira.algorithms.rollouts:rl_algorithm")

if __name__ == "__main__":
    cli.run_command(main)
