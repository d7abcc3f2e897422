"""Supervised fine-tuning.

python -m easyaira.train_sft --config configs/aira-2-124m.yaml --mesh dp=1,fsdp=-1,tp=1
"""

from easyaira import cli
from easyaira.config.run import TrainSFT

main = cli.command(TrainSFT, "easyaira.algorithms.sft:sft_algorithm")

if __name__ == "__main__":
    cli.run_command(main)
