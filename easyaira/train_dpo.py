"""Direct preference optimisation.

python -m easyaira.train_dpo --config configs/aira-2-124m-dpo.yaml --mesh dp=1,fsdp=-1,tp=1
"""

from easyaira import cli
from easyaira.config import TrainDPO


def main(argv: list[str]) -> None:
    config, dry_run = cli.parse(TrainDPO, argv)

    from easyaira.reference import dpo_algorithm  # after the command line: --help answers at once
    from easyaira.run import run

    run(config, dpo_algorithm(config), dry_run=dry_run)


if __name__ == "__main__":
    cli.run_command(main)
