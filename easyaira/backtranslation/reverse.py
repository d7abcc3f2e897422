"""Seed data for both directions: instruction to answer, and answer to instruction."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from easyaira.backtranslation.rows import Exchange, exchanges
from easyaira.config.data import Source
from easyaira.data import sources
from easyaira.errors import DataError
from easyaira.generation import sets

TRAIN, HELD_OUT, SEED = "train.jsonl", "held_out.jsonl", "seed.jsonl"


def reverse(source: Source, folder: Path, held_out: int) -> dict[str, int]:
    """Write the rows reversed, and those to train on also as they were; return the counts.

    Args:
        held_out: least number of rows in HELD_OUT; rows with the same answer stay together.

    Raises:
        ConfigError: the folder belongs to another command.
        DataError: a row is unreadable, or too few are left to train on.
    """
    settings = {"step": "reverse", "data": sources.content_key(source), "held_out": held_out}
    sets.check_folder(folder, settings)
    rows = list(exchanges(source))
    usable = [row for row in rows if row.fault is None]
    kept_apart = _held_out(usable, held_out)
    counts = Counter({"rows": len(rows)})
    counts.update(row.fault for row in rows if row.fault)
    counts[HELD_OUT] = sum(row.answer in kept_apart for row in usable)
    counts[TRAIN] = counts[SEED] = len(usable) - counts[HELD_OUT]
    if not counts[TRAIN]:
        raise DataError(
            f"{source.path}: of {len(rows)} rows, {len(usable)} hold an exchange and "
            f"{counts[HELD_OUT]} are held out; none is left to train on"
        )
    sets.begin(folder, settings)
    with sets.writing(folder), sets.new_sets(folder, (SEED, TRAIN, HELD_OUT)) as put:
        for row in usable:
            name = HELD_OUT if row.answer in kept_apart else TRAIN
            put(name, {"prompt": row.answer, "completion": row.instruction})
            if name == TRAIN:
                put(SEED, {"prompt": row.instruction, "completion": row.answer})
        sets.write_counts(folder, counts)
    return dict(counts)


def _held_out(rows: list[Exchange], wanted: int) -> set[str]:
    """Answers whose rows are held out; independent of the order of the rows."""
    of = Counter(row.answer for row in rows)
    chosen: set[str] = set()
    for answer in sorted(of, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if sum(of[text] for text in chosen) >= wanted:
            break
        chosen.add(answer)
    return chosen
