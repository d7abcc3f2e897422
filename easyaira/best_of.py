"""Rejection sampling: sample answers, score them, keep the best for SFT and best and worst for DPO.

python -m easyaira.best_of runs/aira-2-124m --prompts in.jsonl --reward runs/judge --output best
"""

from __future__ import annotations

from easyaira import cli, generate
from easyaira.errors import ConfigError, DataError, escaped
from easyaira.files import named_path

AIRA = {"num_samples": 5, "temperature": 0.6, "top_k": 50, "top_p": 0.6}  # as Aira samples


def parser():
    from easyaira.config.ranges import Count
    from easyaira.short_help import Parser

    parser = Parser(
        description="Sample answers to a file of prompts, score them with a reward model, and keep "
        "the best as an SFT set, best and worst as a DPO set.",
    )
    add = parser.add_argument
    add("model", help="Run folder, Hugging Face folder or hub id.")
    add(
        "--prompts",
        required=True,
        help="Rows with a column prompt or messages: .jsonl, .json, .csv, .parquet or hub id.",
    )
    add("--reward", required=True, help="Reward model: run folder, Hugging Face folder or hub id.")
    add("--toxicity", help="Toxicity model; an answer that scores below 0 is never the best.")
    add("--output", required=True, help="Folder. The same command continues an interrupted one.")
    add("--num_samples", type=Count, help="Answers to each prompt, at least 2.")
    generate.sampling_options(parser)
    parser.set_defaults(AIRA)
    return parser


def main(argv: list[str]) -> None:
    args = cli.parse_args(parser(), argv)
    if args.num_samples < 2:
        raise ConfigError("--num_samples: found 1; the best needs at least 2 to choose from")
    if not args.temperature:
        raise ConfigError("--temperature: found 0, which gives equal answers; set it above 0")

    from easyaira.data.cache import keep_compiled
    from easyaira.distributed import mesh as meshes
    from easyaira.generation import sets
    from easyaira.rewards import best_of
    from easyaira.rewards.model import RewardModel

    folder = named_path(args.output)
    mesh = meshes.make_mesh(args.mesh)
    keep_compiled()
    reward = RewardModel(args.reward, mesh, args.dtype)
    toxicity = args.toxicity and RewardModel(args.toxicity, mesh, args.dtype)
    settings = {
        "reward model": reward.origin.identity(),
        "toxicity model": toxicity and toxicity.origin.identity(),
    }
    sets.check_folder(folder, settings)
    for place, messages in best_of.questions(args.prompts):
        try:
            reward.check(messages)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
    sets.begin(folder, settings)
    generate.main(generate.file_flags(args, args.prompts, folder / best_of.ANSWERS))
    if best_of.complete(folder):
        print(f"{escaped(args.output)}: all answers are scored")
        return
    models = [model.load() for model in (reward, toxicity) if model]
    with sets.writing(folder):
        counts = best_of.write(folder, args.num_samples, models)
    rows = ", ".join(f"{name} {count:,}" for name, count in counts.items() if type(count) is int)
    print(f"{escaped(args.output)}: {rows}")
    best = counts["mean score of the best"]
    of_best = "no best answer" if best is None else f"{best:.4g} of the best"
    if best is None and (cut := counts.get("cut")):
        of_best += f": {cut:,} were cut; raise --max_new_tokens, and name another --output"
    print(f"mean score {counts['mean score of all']:.4g} of all answers, {of_best}")


if __name__ == "__main__":
    cli.run_command(main)
