"""Instruction backtranslation: reverse seed data, find instructions for texts, rate them, repeat.

python -m easyaira.backtranslate reverse --data seed.jsonl --output reversed
python -m easyaira.backtranslate augment runs/backward --texts web.jsonl --output augmented
python -m easyaira.backtranslate curate runs/judge --pairs augmented/pairs.jsonl --output curated
python -m easyaira.backtranslate iterate --config sft.yaml --seed_data reversed/seed.jsonl \
    --pairs augmented/pairs.jsonl --output rounds
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyaira import cli, generate
from easyaira.errors import escaped
from easyaira.files import named_path

ROWS = "as for training: .jsonl, .jsonl.gz, .json, .csv, .parquet or hub id."
FOLDER = "Folder. The same command continues an interrupted one."
COLUMNS = "EasyAira's column name -> the data set's, as data.columns."


def parser():
    from easyaira.short_help import Parser

    def new(purpose: str) -> Any:
        return Parser(description=purpose)

    whole = new("Instruction backtranslation (Li et al., 2023), from file to file.")
    steps = whole.add_subcommands(required=True, dest="step")
    for name, (purpose, options) in STEPS.items():
        step = new(purpose)
        options(step)
        steps.add_subcommand(name, step, help=purpose)
    return whole


def reverse_options(step: Any) -> None:
    from easyaira.config.ranges import CountOrZero

    add = step.add_argument
    add("--data", required=True, help=f"Rows with instructions and answers, {ROWS}")
    add("--columns", type=dict[str, str], default={}, help=COLUMNS)
    add("--held_out", type=CountOrZero, default=0, help="Rows to hold out, for augment.")
    add("--output", required=True, help=FOLDER)
    cli.debug_option(step)


def augment_options(step: Any) -> None:
    add = step.add_argument
    add("model", help="Backward model: run folder, Hugging Face folder or hub id.")
    add("--texts", required=True, help=f"Rows with a column text, {ROWS}")
    add("--columns", type=dict[str, str], default={}, help=COLUMNS)
    add("--output", required=True, help=FOLDER)
    generate.sampling_options(step)
    step.set_defaults({"temperature": 0.7, "top_p": 0.9})  # Li et al. (2023), section 3.1


def curate_options(step: Any) -> None:
    add = step.add_argument
    add("model", help="Judge: run folder, Hugging Face folder or hub id.")
    add("--pairs", required=True, help=f"Rows with prompt and completion, {ROWS}")
    add("--output", required=True, help=FOLDER)
    generate.sampling_options(step)


def iterate_options(step: Any) -> None:
    from typing import Literal

    from easyaira.config.ranges import Count

    add = step.add_argument
    add("--config", required=True, help="YAML file of `easyaira sft`, without data.train.")
    add("--seed_data", required=True, help=f"Rows with prompt and completion, {ROWS}")
    add("--pairs", required=True, help="Such rows, written by `augment`.")
    add("--rounds", type=Count, default=2, help="Models to train after that of the seed data.")
    add("--threshold", type=Literal[4, 5], default=5, help="Lowest score of pairs to train on.")
    add("--output", required=True, help=FOLDER)
    generate.sampling_options(step)


STEPS = {
    "reverse": ("Swap instruction and answer of seed data.", reverse_options),
    "augment": ("Find an instruction for each text with a backward model.", augment_options),
    "curate": ("Rate pairs from 1 to 5 with a model; keep the best.", curate_options),
    "iterate": ("Curate and train in rounds, starting from seed data.", iterate_options),
}


def main(argv: list[str]) -> None:
    whole = cli.parse_args(parser(), argv)
    args = whole[whole.step]

    from easyaira.backtranslation.augment import augment
    from easyaira.backtranslation.curate import curate
    from easyaira.backtranslation.iterate import iterate
    from easyaira.backtranslation.reverse import reverse
    from easyaira.config.data import Source

    folder = named_path(args.output)
    match whole.step:
        case "reverse":
            show(
                args.output, reverse(Source(args.data, columns=args.columns), folder, args.held_out)
            )
        case "augment":
            show(args.output, augment(Source(args.texts, columns=args.columns), folder, args))
        case "curate":
            show(args.output, curate(Source(args.pairs), folder, args))
        case "iterate":
            for counts in iterate(args):
                number = counts["round"]
                show(f"{args.output}/{number}", {k: v for k, v in counts.items() if k != "round"})


def show(place: str, counts: Mapping[str, Any]) -> None:
    """Print counts, and measures below them."""
    rows = [f"{name} {count:,}" for name, count in counts.items() if type(count) is int]
    print(f"{escaped(place)}: {', '.join(rows)}", flush=True)
    for name, measures in counts.items():
        if isinstance(measures, Mapping):
            print(f"{name}: {', '.join(f'{key} {value:.2f}' for key, value in measures.items())}")


if __name__ == "__main__":
    cli.run_command(main)
