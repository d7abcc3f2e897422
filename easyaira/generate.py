"""Generate an answer to a prompt, greedily or sampled.

python -m easyaira.generate runs/aira-2-124m --prompt "What is alignment?"
"""

from __future__ import annotations

import sys

from easyaira import cli


def parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="Answer a prompt.", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("model", help="Run folder, Hugging Face folder or hub id.")
    parser.add_argument("--prompt", required=True, help="The user's message.")
    parser.add_argument(
        "--template",
        default="chat",
        help="As data.template; chat: the model's own.",
    )
    parser.add_argument("--max_new_tokens", type=int, default=200, help="Maximal answer length.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Nucleus sampling; 1: off.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sampling.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def main(argv: list[str]) -> None:
    args = cli.parse_args(parser(), argv)

    from easyaira.data.template import Template
    from easyaira.distributed import mesh as meshes
    from easyaira.generation.sampler import generate
    from easyaira.models.registry import model_of
    from easyaira.storage import pretrained

    origin = pretrained.find(args.model)
    model = model_of(origin.config, str(origin.folder), scorer=False)
    origin.check(model)
    tokenizer = origin.tokenizer()
    template = Template(tokenizer, args.template, origin.config["model_type"])
    mesh = meshes.make_mesh("fsdp=-1")
    with model.on(mesh):
        params = origin.load(model, mesh)
        answer = generate(
            model,
            params,
            [template.prompt([{"role": "user", "content": args.prompt}]).tolist()],
            eos_ids=template.end_ids,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )[0]
    print(template.text(answer))


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
