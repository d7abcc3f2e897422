"""Self-augmentation: a backward model p(instruction | text) gives each text an instruction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easyaira.backtranslation import ask, measure
from easyaira.backtranslation.rows import texts
from easyaira.config.data import Source
from easyaira.data import sources
from easyaira.generation import sets

PAIRS, NOT_PAIRED = "pairs.jsonl", "not_paired.jsonl"


def augment(source: Source, folder: Path, args: Any) -> dict[str, Any]:
    """Write a pair of instruction and text for each text; return the counts.

    Where the rows have true instructions, the generated ones are compared with them.

    Raises:
        EasyAiraError: as `ask`.
    """
    settings = {"step": "augment", "texts": sources.content_key(source)}
    ask.ask(_questions(source), folder, settings, args)
    with sets.writing(folder):
        return _write(folder)


def _questions(source: Source) -> Iterator[ask.Question]:
    seen: set[tuple[str, str | None]] = set()
    checked = False
    for number, (place, text, instruction) in enumerate(texts(source)):
        columns = {"text_id": number}
        if instruction is not None:
            if not checked:
                measure.check()
                checked = True
            columns["instruction"] = instruction
        fault = None if text.strip() else "empty text"
        fault = fault or ("repeated text" if (text, instruction) in seen else None)
        seen.add((text, instruction))
        yield ask.Question(place, text, columns, fault)


def _write(folder: Path) -> dict[str, Any]:
    """Sort the answers into pairs and others."""
    counts: Counter = Counter()
    examples: list[measure.Example] = []
    with sets.new_sets(folder, (NOT_PAIRED, PAIRS)) as put:
        for row in sets.rows_of(folder / ask.NOT_ASKED):
            put(NOT_PAIRED, row)
            counts[row["fault"]] += 1
        for row in sets.rows_of(folder / ask.ANSWERS):
            instruction, text = row["generated"].strip(), row["prompt"]
            fault = ask.CUT if row["finish_reason"] == "length" else None
            fault = fault or (None if instruction else "empty instruction")
            if "instruction" in row:
                examples.append(measure.Example(text, instruction, row["instruction"]))
            if fault is None:
                pair = {"prompt": instruction, "completion": text, "text_id": row["text_id"]}
                put(PAIRS, pair)
                counts[PAIRS] += 1
                continue
            put(NOT_PAIRED, {"text_id": row["text_id"], "fault": fault, "generated": instruction})
            counts[fault] += 1
        numbers: dict[str, Any] = {"texts": counts.total(), PAIRS: counts[PAIRS]}
        numbers |= dict(counts)
        if examples:
            numbers |= measure.report(folder, examples, numbers)
        sets.write_counts(folder, numbers)
    return numbers
