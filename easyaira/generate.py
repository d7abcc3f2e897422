"""Generate an answer to a prompt, greedily or sampled.

python -m easyaira.generate runs/aira-2-124m --prompt "What is alignment?"
"""

from __future__ import annotations

import sys

from easyaira import cli
from easyaira.errors import ConfigError


def parser():
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import PositiveInt

    from easyaira.config.ranges import NonNegative, Seed, TopP

    parser = ArgumentParser(description="Answer a prompt.", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("model", help="Run folder, Hugging Face folder or hub id.")
    parser.add_argument("--prompt", required=True, help="The user's message.")
    parser.add_argument(
        "--template",
        default="chat",
        help="As data.template; chat: the model's own.",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=PositiveInt,
        help="Maximal answer length; default: as generation_config.json, or 200.",
    )
    parser.add_argument(
        "--temperature",
        type=NonNegative,
        help="0: greedy; default: as generation_config.json, or greedy.",
    )
    parser.add_argument(
        "--top_p",
        type=TopP,
        help="Nucleus sampling; 1: off; default: as generation_config.json, or off.",
    )
    parser.add_argument("--seed", type=Seed, default=0, help="Seed of the sampling.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def main(argv: list[str]) -> None:
    args = cli.parse_args(parser(), argv)
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("--prompt: is not UTF-8; set the terminal's encoding to it") from error

    from easyaira.data.template import Template
    from easyaira.distributed import mesh as meshes
    from easyaira.generation.sampler import generate
    from easyaira.generation.settings import end_ids, files_of, options_of
    from easyaira.models.registry import model_of
    from easyaira.storage import pretrained

    origin = pretrained.find(args.model)
    model = model_of(origin.config, origin.where, scorer=False)
    origin.check(model)
    tokenizer = origin.tokenizer()
    template = Template(tokenizer, args.template, origin.config["model_type"])
    options = {"max_new_tokens": 200} | options_of(origin.generation_config)
    for name in ("max_new_tokens", "temperature", "top_p"):
        if (value := getattr(args, name)) is not None:
            options[name] = value
    if args.top_p is not None and not options.get("temperature"):
        raise ConfigError("--top_p: has no effect on greedy generation; set --temperature, too")
    eos_ids = end_ids(template, files_of(origin), model.vocab_size)
    prompt = template.prompt([{"role": "user", "content": args.prompt}]).tolist()
    mesh = meshes.make_mesh("fsdp=-1")
    with model.on(mesh):
        params = origin.load(model, mesh)
        answer = generate(model, params, [prompt], eos_ids=eos_ids, seed=args.seed, **options)[0]
    print(template.text(answer))


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
