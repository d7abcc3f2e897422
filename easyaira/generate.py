"""Generate answers to a prompt, to a file of prompts, or in a conversation.

python -m easyaira.generate runs/aira-2-124m --prompt "What is alignment?"
python -m easyaira.generate runs/aira-2-124m --prompts in.jsonl --output out.jsonl
python -m easyaira.generate runs/aira-2-124m --chat
python -m easyaira.generate runs/aira-2-124m --chat --dry_run
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from easyaira import cli
from easyaira.errors import ConfigError, escaped
from easyaira.files import lone_surrogate, named_path

AS_FOLDER = "default: as generation_config.json, or"


def parser():
    from easyaira.config.ranges import Count
    from easyaira.short_help import Parser

    parser = Parser(
        description="Answer a prompt, a file of prompts, or in a conversation.",
    )
    add = parser.add_argument
    add("model", help="Run folder, Hugging Face folder or hub id.")
    add("--prompt", help="A message to answer.")
    add("--chat", action="store_true", help="Converse in the terminal; end with Ctrl-D.")
    add(
        "--prompts",
        help="Rows with a column prompt or messages: .jsonl, .json, .csv, .parquet or hub id.",
    )
    add(
        "--output",
        help="File for the answers to --prompts: each row with the columns generated and "
        "finish_reason (end, stop or length). The same command continues an interrupted one.",
    )
    add(
        "--num_samples",
        type=Count,
        default=1,
        help="Answers to each prompt; a column sample numbers them.",
    )
    sampling_options(parser)
    cli.dry_run_options(parser, "Print the memory and time of generation; generate nothing.")
    return parser


def sampling_options(parser: Any) -> None:
    """Add the options of the model and the sampler."""
    from easyaira.config.ranges import (
        Count,
        CountOrZero,
        NonNegative,
        Positive,
        Seed,
        Share,
        TopP,
    )

    add = parser.add_argument
    add("--template", default="chat", help="As data.template; chat: the model's own.")
    add("--max_new_tokens", type=Count, help=f"Longest answer in tokens; {AS_FOLDER} 200.")
    add("--min_new_tokens", type=CountOrZero, help=f"Shortest answer in tokens; {AS_FOLDER} 0.")
    add("--temperature", type=NonNegative, help=f"Divisor of the logits, 0: greedy; {AS_FOLDER} 0.")
    add(
        "--top_k", type=CountOrZero, help=f"Sample from the k likeliest tokens; {AS_FOLDER} 0: off."
    )
    add(
        "--top_p",
        type=TopP,
        help=f"Sample from the likeliest tokens that add up to this; {AS_FOLDER} 1: off.",
    )
    add(
        "--min_p",
        type=Share,
        help=f"Leave out tokens below this share of the likeliest; {AS_FOLDER} 0: off.",
    )
    add("--repetition_penalty", type=Positive, help=f"Above 1, repeat less; {AS_FOLDER} 1: off.")
    add("--stop", action="append", help="Text that ends an answer and is cut off; may be repeated.")
    add("--seed", type=Seed, default=0, help="Random seed of the sampling.")
    add("--batch_size", type=Count, default=64, help="Answers that are generated together.")
    cli.computing_options(parser)


def file_flags(args: Any, prompts: Any, output: Any) -> list[str]:
    """The command line that answers a file, for commands with the options of this one."""
    from easyaira.generation.settings import NUMBERS

    flags = [args.model, f"--prompts={prompts}", f"--output={output}", f"--dtype={args.dtype}"]
    flags += [f"--stop={text}" for text in args.stop or []]
    names = (*NUMBERS, "num_samples", "template", "seed", "batch_size", "mesh")
    given = {name: getattr(args, name, None) for name in names}
    return flags + [f"--{name}={value}" for name, value in given.items() if value is not None]


def check(args: Any) -> None:
    """Check the options against each other.

    Raises:
        ConfigError: they contradict each other.
    """
    asked = [
        name for name in ("prompt", "chat", "prompts") if getattr(args, name) not in (None, False)
    ]
    if len(asked) != 1:
        raise ConfigError(
            f"give one of --prompt, --chat, --prompts; found {' and '.join(asked) or 'none'}"
        )
    if (args.prompts is None) != (args.output is None):
        raise ConfigError("--prompts and --output: need each other; give both")
    if args.topology and not args.dry_run:
        raise ConfigError("--topology: needs --dry_run; give both")
    if args.chat and args.num_samples > 1:
        raise ConfigError("--num_samples: a conversation has one answer; leave it out")
    for name in ("prompt", "stop"):
        if lone_surrogate("".join(getattr(args, name) or "")) is not None:
            raise ConfigError(f"--{name}: is not UTF-8; set the terminal's encoding to it")
    if "" in (args.stop or []):
        raise ConfigError("--stop: found an empty text, expected one")


def load(args: Any, devices: Any = None, planned: bool = False) -> tuple[Any, Any]:
    """The model on `devices` (default: all), without reading its weights, and sampling options.

    Args:
        planned: the model will not run, so that its weights may be absent.
    """
    from easyaira.generation.settings import NUMBERS
    from easyaira.loaded import LoadedModel
    from easyaira.storage import pretrained

    origin = pretrained.find(args.model, weights_wanted=not planned)
    loaded = LoadedModel(
        origin,
        mesh=args.mesh,
        dtype=args.dtype,
        template=args.template,
        devices=devices,
        planned=planned,
    )
    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    stops = {"stop_strings": tuple(args.stop)} if args.stop else {}
    return loaded, loaded.sampling(**given, **stops)


def main(argv: list[str]) -> None:
    args = cli.parse_args(parser(), argv)
    check(args)

    from dataclasses import asdict

    from easyaira.data.cache import keep_compiled
    from easyaira.distributed import cards
    from easyaira.generation import prompts
    from easyaira.generation.chat import CUT, chat

    if args.topology:
        cards.prepare_compiler()
    loaded, sampling = load(args, cards.planned_devices(args.topology, None), args.dry_run)
    sampling.check(args.num_samples)
    template = loaded.template
    sampler = loaded.sampler(sampling, args.batch_size, 1 if args.chat else None)

    def text(answer):
        return loaded.text(answer, sampling)

    keep_compiled()
    if args.prompts:
        settings = {
            "template": f"{args.template} ({template.fingerprint()[:16]})",
            "dtype": args.dtype,
        }
        settings |= {"num_samples": args.num_samples, "seed": args.seed}
        settings |= {k: list(v) if type(v) is tuple else v for k, v in asdict(sampling).items()}
        asked = prompts.read(args.prompts, template, sampler)
        lengths = [len(prompt.tokens) for prompt in asked]
    elif args.prompt is not None:
        tokens = template.prompt([{"role": "user", "content": args.prompt}]).tolist()
        sampler.limit(tokens)
        lengths = [len(tokens)]
    else:  # a conversation may fill the context
        lengths = [loaded.model.config.max_positions - 1]
    if args.dry_run:
        print(plan(loaded, sampler, lengths, args.num_samples))
        return
    if args.prompts:
        settings = {"model": loaded.origin.identity(), **settings}
        output = prompts.Output(named_path(args.output), asked, args.num_samples, settings)
        if output.written == output.total:
            print(f"{args.output}: all {output.total:,} answers are there")
            return
    with loaded.model.on(loaded.mesh):
        weights = loaded.weights(sampler)
        if args.chat:
            chat(sampler, weights, template, questions(), show, args.seed)
        elif args.prompt is not None:
            answers = dict(
                sampler.answers(weights, [tokens], num_samples=args.num_samples, seed=args.seed)
            )
            for number in sorted(answers):
                print(text(answers[number]))
            if any(answer.reason == "length" for answer in answers.values()):
                print(f"note: {CUT}", file=sys.stderr)
        else:
            write(output, sampler, weights, args, text)


def plan(loaded: Any, sampler: Any, lengths: list[int], num_samples: int) -> str:
    """The memory and time of answering prompts of these lengths, in words."""
    from easyaira.plan import decoding

    rows, slots = sampler.largest_cache(lengths, num_samples)
    cost = decoding.measure(sampler, loaded.mesh, rows, slots)
    return decoding.show(cost, loaded.mesh)


def questions() -> Iterator[str]:
    """Lines that the user types.

    Raises:
        ConfigError: one is not UTF-8.
    """
    while sys.stdin:  # None if it is closed
        try:
            line = input("> ").strip()
            line.encode()
        except EOFError:
            print()
            return
        except UnicodeError as error:
            raise ConfigError(
                "the question is not UTF-8; set the terminal's encoding to it"
            ) from error
        if line:
            yield line


def show(text: str) -> None:
    print(text, end="", flush=True)


def write(output: Any, sampler: Any, weights: Any, args: Any, text: Any) -> None:
    """Generate the answers that the output lacks, with a progress bar."""
    import time

    from tqdm import tqdm

    start, count = time.perf_counter(), 0
    with tqdm(total=output.total, initial=output.written, unit="answer", disable=None) as bar:

        def progress(_, new):
            nonlocal count
            count += len(new)
            bar.set_postfix_str(f"{count / (time.perf_counter() - start):,.0f} tokens/s", False)

        def counted():
            for answer in sampler.answers(
                weights,
                [prompt.tokens.tolist() for prompt in output.prompts],
                num_samples=args.num_samples,
                seed=args.seed,
                first=output.written,
                progress=progress,
            ):
                bar.update()
                yield answer

        output.write(counted(), text)
    print(f"{escaped(args.output)}: {output.total:,} answers, {count:,} new tokens")


if __name__ == "__main__":
    cli.run_command(main)
