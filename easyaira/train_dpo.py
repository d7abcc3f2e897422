"""Direct preference optimisation.

python -m easyaira.train_dpo --config configs/aira-2-124m-dpo.yaml --mesh dp=1,fsdp=-1,tp=1
"""

import sys

from easyaira import cli
from easyaira.config.run import TrainDPO
from easyaira.in_python import Training

CONFIG, ALGORITHM = TrainDPO, "easyaira.algorithms.dpo:dpo_algorithm"
main = cli.command(CONFIG, ALGORITHM)
sys.modules[__name__].__class__ = Training

if __name__ == "__main__":
    cli.run_command(main)
