"""Rounds of self-training: a model rates the pairs, and the next one learns from those it kept."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

from easyaira import cli, train_sft
from easyaira.backtranslation.curate import KEPT, curate
from easyaira.backtranslation.rows import exchanges
from easyaira.config.data import Source
from easyaira.data import sources
from easyaira.errors import DataError
from easyaira.files import named_path
from easyaira.generation import sets

# Li et al. (2023), section 2.4: a tag after the instruction says where its answer comes from
SEED_TAG = "Answer in the style of an AI Assistant."
WEB_TAG = "Answer with knowledge from web search."
TRAIN, RUN, CURATED = "train.jsonl", "run", "curated"


def tagged(instruction: str, tag: str) -> str:
    return f"{instruction}\n{tag}"


def mix(seed: Source, kept: Source | None, folder: Path) -> dict[str, int]:
    """Write seed and kept rows with their tags to the folder's TRAIN; return the counts."""
    counts = {"seed rows": 0, "kept rows": 0}
    with sets.writing(folder), sets.new_sets(folder, (TRAIN,)) as put:
        for source, tag, name in ((seed, SEED_TAG, "seed rows"), (kept, WEB_TAG, "kept rows")):
            for row in exchanges(source) if source else ():
                if row.fault is None:
                    prompt = tagged(row.instruction, tag)
                    put(TRAIN, {"prompt": prompt, "completion": row.answer})
                    counts[name] += 1
    return counts


def iterate(args: Any) -> Iterator[dict[str, Any]]:
    """Train model 0 on seed rows. In each round, the newest model rates the pairs; the next model
    starts from the same weights as model 0 and trains on seed rows and kept pairs. Yield each
    round's counts before its training.

    Args:
        args: seed_data, pairs, config, rounds, threshold and output; for the ratings, the options
            of `generate` without the model.

    Raises:
        DataError: no pair reaches the threshold.
        EasyAiraError: as `curate` and train_sft.
    """
    output, seed, pairs = named_path(args.output), Source(args.seed_data), Source(args.pairs)
    settings = {"step": "iterate", "seed_data": sources.content_key(seed)}
    settings |= {"pairs": sources.content_key(pairs), "threshold": args.threshold}
    sets.check_folder(output, settings)
    cli.parse(train_sft.CONFIG, _training(args.config, output / "0"))  # refuse a wrong one now
    sets.begin(output, settings)
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds + 1):
        folder, row = output / str(number), {"round": number}
        with sets.writing(folder):
            folder.mkdir(exist_ok=True)
        kept = None
        if number:
            judge = copy(args)
            judge.model = str(output / str(number - 1) / RUN)
            counts = curate(pairs, folder / CURATED, judge)
            name = KEPT[args.threshold]
            if not counts[name]:
                raise DataError(
                    f"{folder}: of {counts['pairs']} pairs, the model of round {number - 1} "
                    f"scored {counts['scored.jsonl']}, none of them {args.threshold} or better; "
                    f"look at {CURATED}/counts.json, lower --threshold, or use a larger model"
                )
            kept, row = Source(str(folder / CURATED / name)), row | counts
        rounds.append(row | mix(seed, kept, folder))
        yield rounds[-1]
        train_sft.main(_training(args.config, folder))
        with sets.writing(output):
            sets.write_counts(output, {"rounds": rounds})


def _training(config: str, folder: Path) -> list[str]:
    """The command line of train_sft for a round's rows."""
    return [
        f"--config={config}",
        f"--data.train={folder / TRAIN}",
        "--data.split=train",
        "--data.columns={}",
        "--data.reverse=false",
        f"--output_dir={folder / RUN}",
    ]
