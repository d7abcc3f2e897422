"""Direct preference optimisation.

python -m easyaira.train_dpo --config configs/aira-2-124m-dpo.yaml --mesh dp=1,fsdp=-1,tp=1
"""

from easyaira import cli
from easyaira.config.run import TrainDPO

main = cli.command(TrainDPO, "easyaira.algorithms.dpo:dpo_algorithm")

if __name__ == "__main__":
    cli.run_command(main)
