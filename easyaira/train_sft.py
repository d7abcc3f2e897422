"""Supervised fine-tuning.

python -m easyaira.train_sft --config configs/aira-2-124m.yaml --mesh dp=1,fsdp=-1,tp=1
"""

import sys

from easyaira import cli
from easyaira.config.run import TrainSFT
from easyaira.in_python import Training

CONFIG, ALGORITHM = TrainSFT, "easyaira.algorithms.sft:sft_algorithm"
main = cli.command(CONFIG, ALGORITHM)
sys.modules[__name__].__class__ = Training

if __name__ == "__main__":
    cli.run_command(main)
