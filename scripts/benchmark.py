"""Benchmarks, with both sides of a comparison measured on this machine.

    python scripts/benchmark.py data                                   # a million synthetic rows
    python scripts/benchmark.py data --folder DATA --tokenizer FOLDER  # and real files
    python scripts/benchmark.py train --task dpo --lengths hh --peer trl
    python scripts/benchmark.py train --task dpo --lengths hh --ladder --plot ladder.png
    python scripts/benchmark.py train --task dpo --lengths hh --against share_prompt
    python scripts/benchmark.py train --task dpo --lengths ultrafeedback --answers 4 --against pairs
    python scripts/benchmark.py train --task sft --gradient_checkpointing none,dots,full
    python scripts/benchmark.py train --task dpo --lengths hh --profile trace
    python scripts/benchmark.py matrix --model gpt2-small-8k --output matrix.md   # against TRL
    python scripts/benchmark.py core                                   # the log-probabilities
    python scripts/benchmark.py generate --model gpt2-small            # beside transformers
    python scripts/benchmark.py evaluate --folder MODEL --data DATA    # beside lm-eval's hf

Prints a table; --json FILE also writes its figures. The measurements are in benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import core, data, evaluation, generation, matrix, show, training
from benchmarks.lengths import KINDS
from benchmarks.sides import MODELS

DTYPES = ["float32", "bfloat16"]


def checkpointing(text: str) -> list[str]:
    """Parse `none,dots,full` into a list."""
    given = text.split(",")
    if unknown := set(given) - set(training.CHECKPOINTING):
        known = ", ".join(training.CHECKPOINTING)
        raise argparse.ArgumentTypeError(f"{sorted(unknown)} not among {known}")
    return given


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="what", required=True)
    of_data = commands.add_parser("data", help="tokenising, packing, planning, serving")
    of_data.add_argument("--rows", type=int, default=1_000_000, help="synthetic rows of each kind")
    of_data.add_argument("--folder", type=Path, help="real data: sft/ preference/ toxicity/")
    of_data.add_argument("--tokenizer", type=Path, help="tokenizer folder for the real data")
    of_training = commands.add_parser("train", help="updates, against TRL or other options")
    add = of_training.add_argument
    add("--task", choices=["sft", "dpo"], default="dpo")
    add("--model", choices=list(MODELS), default="gpt2-small")
    add("--lengths", choices=list(KINDS), default="aira", help="data set whose lengths to imitate")
    add("--examples", type=int, default=8, help="examples of an update (DPO: pairs)")
    add("--answers", type=int, default=2, help="DPO: answers to a prompt")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of products, on all sides")
    add("--updates", type=int, default=8, help="updates of a round")
    add("--rounds", type=int, default=5)
    add("--peer", choices=list(training.PEERS), help="pip install trl, and liger-kernel on GPUs")
    compared = of_training.add_mutually_exclusive_group()
    compared.add_argument("--ladder", action="store_true", help="add our optimisations one by one")
    compared.add_argument(
        "--against", choices=list(training.AGAINST), help="one optimisation on and off; naive: all"
    )
    compared.add_argument(
        "--gradient_checkpointing",
        type=checkpointing,
        help="settings to compare, such as none,dots,full",
    )
    add("--profile", type=Path, metavar="FOLDER", help="trace a round of our last side")
    add("--plot", type=Path, metavar="FILE.png", help="bar chart of tokens per CPU second")
    add("--debug", action="store_true", help="show the standard error of the sides")
    of_matrix = commands.add_parser("matrix", help="training against TRL's best, as Markdown")
    add = of_matrix.add_argument
    add("--model", nargs="+", choices=list(MODELS), default=["gpt2-small-8k", "gpt2-124m"])
    add("--task", nargs="+", choices=["sft", "dpo"], default=["sft", "dpo"])
    add("--lengths", nargs="+", choices=list(KINDS), default=list(KINDS))
    add("--examples", nargs="+", type=int, default=[8], help="examples of an update")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    add("--updates", type=int, default=6, help="updates of a round")
    add("--rounds", type=int, default=3)
    add("--output", type=Path, required=True, metavar="FILE.md", help="and a picture beside it")
    add("--debug", action="store_true", help="show the standard error of the sides")
    of_core = commands.add_parser("core", help="log-probabilities, against full logits")
    of_generation = commands.add_parser("generate", help="answers, against transformers")
    of_generation.add_argument("--model", choices=list(generation.SIZES), default="small")
    of_generation.add_argument("--rounds", type=int, default=3)
    of_generation.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    of_evaluation = commands.add_parser("evaluate", help="log-likelihoods, against lm-eval's hf")
    of_evaluation.add_argument("--folder", type=Path, required=True, help="language model")
    of_evaluation.add_argument("--data", type=Path, required=True, help="files of the tasks")
    of_evaluation.add_argument("--task", default="arc_challenge")
    of_evaluation.add_argument("--num_fewshot", type=int, default=25)
    of_evaluation.add_argument("--limit", type=int, help="first questions only")
    of_evaluation.add_argument("--rounds", type=int, default=2)
    for command in (of_data, of_training, of_matrix, of_core, of_generation, of_evaluation):
        command.add_argument("--json", type=Path, help="also write the figures to this file")
    return top


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        training.worker(json.loads(sys.argv[2]))
        return
    args = parser().parse_args()
    if args.what == "data":
        figures = data.data(args)
    elif args.what == "matrix":
        figures = matrix.matrix(args)
    elif args.what == "generate":
        figures = generation.generation(args)
        show.table(figures)
    elif args.what == "evaluate":
        figures = evaluation.evaluation(args)
        show.table(figures)
    elif args.what == "core":
        figures = core.core()
        show.table(figures)
    else:
        figures, costs = training.measure(args)
        show.table(figures)
        if costs:
            print()
            show.table(costs[:3])
            figures = {"sides": figures, "costs": costs}
        if args.plot:
            show.bars(figures["sides"] if costs else figures, title(args), args.plot)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def title(args: argparse.Namespace) -> str:
    of = "pairs" if args.task == "dpo" else "examples"
    return (
        f"{args.task.upper()} of {args.model}, lengths like {args.lengths}, "
        f"{args.examples} {of} an update"
    )


if __name__ == "__main__":
    main()
