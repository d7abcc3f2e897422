"""Evaluate a model: benchmarks by lm-evaluation-harness, or a scorer on pairs or labelled texts.

python -m easyaira.evaluate MODEL --tasks arc_challenge,arc_easy --num_fewshot 25
python -m easyaira.evaluate MODEL --tasks truthfulqa_mc2 --data FOLDER_OF_FILES
python -m easyaira.evaluate SCORER --rows pairs.jsonl
python -m easyaira.evaluate --compare MODEL MODEL ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyaira import cli
from easyaira.errors import ConfigError
from easyaira.files import named_path

MISSING = "tasks: need lm-evaluation-harness; pip install 'lm-eval>=0.4.13'"
TORCH = True  # lm-evaluation-harness uses it
OF_TASKS = ("num_fewshot", "data")
OF_ROWS = ("by", "split", "template", "positive_label")


def parser():
    from typing import Literal

    from easyaira.config.ranges import Count, CountOrZero
    from easyaira.short_help import Parser

    parser = Parser(
        description="Evaluate a model on benchmarks, or a scorer on pairs or labelled texts.",
    )
    add = parser.add_argument
    add("model", nargs="?", help="Run folder, Hugging Face folder or hub id.")
    add("--tasks", help="Tasks of lm-evaluation-harness, joined by commas.")
    add(
        "--num_fewshot",
        type=CountOrZero,
        help="Examples in each prompt; default: as the task says, or 0.",
    )
    add("--data", help="Folder of data files to use instead of the hub's data.")
    add("--rows", help="Pairs, or texts with labels, to score: file, folder or hub id.")
    add("--split", help="Split of --rows; default: train.")
    add("--by", help="Column of --rows whose values get a line each, such as target.")
    add("--template", help="As data.template, for --rows; default: chat, the model's own.")
    add(
        "--positive_label",
        type=Literal[0, 1],
        help="Label that scores above 0, for --rows; default: 0, since 1 is toxic.",
    )
    add("--limit", type=Count, help="Use only the first N questions or rows.")
    add("--output", help="Folder of the results; default: MODEL/evaluation.")
    add("--compare", nargs="+", help="Print a Markdown table of the results of these models.")
    add("--batch_tokens", type=Count, default=4096, help="Tokens at a time, per data shard.")
    cli.computing_options(parser)
    return parser


def check(args: Any) -> None:
    """Check the options against each other.

    Raises:
        ConfigError: they contradict each other.
    """
    asked = [name for name in ("tasks", "rows", "compare") if getattr(args, name)]
    if len(asked) != 1:
        raise ConfigError(
            f"give one of --tasks, --rows, --compare; found {' and '.join(asked) or 'none'}"
        )
    if args.compare and args.model:
        raise ConfigError("--compare: takes all models; put it before the first one")
    if not args.compare and not args.model:
        raise ConfigError("model: is missing; name a run folder, a Hugging Face folder or a hub id")
    others = {"tasks": OF_ROWS, "rows": OF_TASKS, "compare": (*OF_ROWS, *OF_TASKS, "limit")}
    for name in others[asked[0]]:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name}: has no effect on --{asked[0]}; leave it out")
    if args.tasks and not args.tasks.strip(" ,"):
        raise ConfigError(
            f"--tasks: found {args.tasks!r}, expected names such as arc_challenge,piqa"
        )
    if args.data and not named_path(args.data).is_dir():
        raise ConfigError(f"data: {args.data}: no such folder; name one with data files")


def main(argv: list[str]) -> None:
    args = cli.parse_args(parser(), argv)
    check(args)
    if args.compare:
        compare(args.compare)
        return

    from easyaira.data.cache import keep_compiled
    from easyaira.evaluation import results
    from easyaira.storage import pretrained

    origin = pretrained.find(args.model)
    folder = named_path(args.output) if args.output else folder_of(origin)
    results.check_folder(folder)
    keep_compiled()
    finished = []
    for result in of_tasks(args, origin, folder) if args.tasks else [of_rows(args, origin, folder)]:
        print(f"{results.write(folder, result)}: {result.label} {result.shown}", flush=True)
        finished.append(result)
    print(results.table(finished))
    for result in finished:
        if result.groups:
            print(results.groups_table(result))


def folder_of(origin: Any) -> Path:
    """Folder of a model's results.

    Raises:
        ConfigError: a model of the hub has none.
    """
    from easyaira.evaluation.results import FOLDER

    if origin.commit is not None:
        raise ConfigError("output: a model of the hub has no folder for results; set --output")
    return origin.folder / FOLDER


def compare(names: list[str]) -> None:
    """Print the results of several models."""
    from easyaira.evaluation import results

    short = [Path(name).resolve().name for name in names]
    models = {}
    for name, last in zip(names, short, strict=True):
        inside, given = Path(name) / results.FOLDER, Path(name)
        of_model = any((given / file).exists() for file in ("config.json", "config.yaml"))
        own = results.read(inside if of_model or inside.is_dir() else given)
        if not own:
            raise ConfigError(f"compare: {name} has no results; evaluate it first")
        models[last if short.count(last) == 1 else name] = own
    print(results.compare(models))


def versions() -> dict[str, Any]:
    from importlib.metadata import version

    from easyaira import __version__

    return {"easyaira": __version__, "lm_eval": version("lm_eval")}


def of_tasks(args: Any, origin: Any, folder: Path):
    """Evaluate one task after another, unless a result would replace another one in the folder."""
    try:
        from easyaira.evaluation import harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ConfigError(MISSING) from error

    from easyaira.evaluation.likelihood import Likelihoods
    from easyaira.evaluation.results import check_earlier, file_of
    from easyaira.generation.settings import end_ids, files_of
    from easyaira.loaded import LoadedModel

    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    data = named_path(args.data) if args.data else None
    tasks = harness.load(names, data)
    for name, task in tasks.items():
        shots = harness.set_shots(task, args.num_fewshot)
        place = harness.place(name, task, data)
        check_earlier(folder / file_of(name, shots), args.limit, place)
    model = LoadedModel(origin, mesh=args.mesh, dtype=args.dtype, template="plain")
    likelihoods = Likelihoods(model.model, model.params, model.mesh, tokens=args.batch_tokens)
    ends = end_ids(model.template, files_of(origin), model.model.vocab_size)
    lm = harness.EasyAiraLM(likelihoods, model.tokenizer, ends)
    for name, task in tasks.items():
        yield harness.result(
            lm,
            name,
            task,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            data=data,
            dtype=args.dtype,
            step=origin.step,
            versions=versions(),
        )


def of_rows(args: Any, origin: Any, folder: Path):
    """Score rows, unless the result would replace another one in the folder."""
    from easyaira import __version__
    from easyaira.config.data import Source
    from easyaira.evaluation import judges
    from easyaira.evaluation.results import Result, check_earlier, digest, file_of
    from easyaira.evaluation.rewardbench import sections

    name, local = Path(args.rows).name, named_path(args.rows)
    place = digest(str(local.resolve()) if local.exists() else args.rows, args.split or "")
    task = f"{name}/{args.split}" if args.split else name
    check_earlier(folder / file_of(task), args.limit, place)
    judged = judges.judge(
        args.model,
        Source(args.rows, args.split or "train"),
        by=args.by,
        limit=args.limit,
        template=args.template or "chat",
        positive_label=args.positive_label or 0,
        dtype=args.dtype,
        mesh=args.mesh,
    )
    left_out = dict(judged.account.dropped) | ({"tie": judged.ties} if judged.ties else {})
    groups = judged.by_group() if args.by else {}
    metrics = judged.metrics() | sections(groups)
    return Result(
        task=task,
        metric="accuracy",
        metrics=metrics,
        better="higher",
        examples=len(judged.margins),
        data=name,
        dtype=args.dtype,
        stderr=judged.stderr(),
        limit=args.limit,
        truncated=judged.truncated,
        left_out=left_out,
        groups=groups,
        step=origin.step,
        versions={"easyaira": __version__},
        place=place,
        content=judged.content,
    )


if __name__ == "__main__":
    cli.run_command(main, torch=TORCH)
