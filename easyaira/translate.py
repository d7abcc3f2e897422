"""Translate a configuration of another trainer to ours, or say why it cannot be.

python -m easyaira.translate trl sft.yaml --devices 8 > ours.yaml
"""

from __future__ import annotations

from copy import deepcopy
from typing import Literal

from easyaira import cli
from easyaira.config.ranges import Count
from easyaira.config.run import TrainDPO, TrainReward, TrainSFT
from easyaira.errors import ConfigError
from easyaira.files import named_path, read_yaml
from easyaira.short_help import Parser
from easyaira.translation.axolotl import AXOLOTL
from easyaira.translation.easylm import EASYLM, flags_of
from easyaira.translation.llama_factory import LLAMA_FACTORY
from easyaira.translation.open_instruct import OPEN_INSTRUCT
from easyaira.translation.translation import Translation, translate
from easyaira.translation.trl import TRL

SOURCES = {
    "trl": TRL,
    "open-instruct": OPEN_INSTRUCT,
    "axolotl": AXOLOTL,
    "llama-factory": LLAMA_FACTORY,
    "easylm": EASYLM,
}
CONFIGS = {"sft": TrainSFT, "dpo": TrainDPO, "reward": TrainReward}


def parser() -> Parser:
    made = Parser(description=__doc__)
    add = made.add_argument
    add("source", choices=SOURCES, help="Trainer that the file is for.")
    add("file", help="Its YAML file; for easylm, the command line in quotes.")
    add("--task", type=Literal["sft", "dpo", "reward"], help="Default: as the keys say.")
    add("--devices", type=Count, default=1, help="Number of devices that the file is run on.")
    add("--drop", action="append", default=[], metavar="KEY",
        help="Leave out a key that is not supported; may be repeated.")  # fmt: skip
    cli.debug_option(made)
    return made


def checked(result: Translation, place: str) -> Translation:
    """The translation, once the command's own parser has accepted it.

    Raises:
        ConfigError: it refuses the values of the file, in the names of our options.
    """
    try:
        cli.configuration(CONFIGS[result.task], deepcopy(result.options))
    except ConfigError as error:
        raise ConfigError(f"{place}: translated, {error}") from error
    return result


def main(argv: list[str]) -> None:
    args = cli.parse_args(parser(), argv)
    source, place = SOURCES[args.source], args.file
    repeated: list[str] = []
    if args.source == "easylm":
        given, place = flags_of(place), "the command line"
    else:
        # duplicate keys: PyYAML of the other trainers takes the last value; OmegaConf refuses them
        strict = args.source == "llama-factory"
        given = read_yaml(named_path(place), repeated=None if strict else repeated)
    options = {"task": args.task, "devices": args.devices, "drop": args.drop}
    result = checked(translate(source, given, place=place, **options), place)
    for key in dict.fromkeys(repeated):
        result.differences.append(
            f"{key} occurs twice in the file; the last value counts, as there"
        )
    print(result.text(f"Translated from {place} ({source.name})"), end="")


if __name__ == "__main__":
    cli.run_command(main)
