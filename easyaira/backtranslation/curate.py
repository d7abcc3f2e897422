"""Self-curation: a model rates each pair from 1 to 5, and pairs with a high score are kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easyaira.backtranslation import ask
from easyaira.backtranslation.rows import exchanges
from easyaira.config.data import Source
from easyaira.data import sources
from easyaira.generation import sets

SCORED, NOT_SCORED = "scored.jsonl", "not_scored.jsonl"
THRESHOLDS = (4, 5)
KEPT = {threshold: f"kept_{threshold}.jsonl" for threshold in THRESHOLDS}
UNPARSABLE = "no score in the last line"
# our words for the five grades of Li et al. (2023)
BEFORE = """Judge whether this pair of instruction and answer should teach an AI assistant.
5: the answer is just what was asked for, by an assistant: expert, complete, in order, no filler.
4: written for this user by an assistant, complete and clear, with small faults.
3: helpful, but someone else is speaking, as in a blog, a forum or the news.
2: covers most of what was asked, but does not address it directly.
1: incomplete, vague, off the topic, or an advertisement.

Instruction:
"""
BETWEEN = "\n\nAnswer:\n"
AFTER = """

First give your reason in a sentence. Then end with a line that holds only "Score: " and a digit."""


def question(instruction: str, answer: str) -> str:
    """The request to rate a pair."""
    return f"{BEFORE}{instruction}{BETWEEN}{answer}{AFTER}"


def score_of(reply: str) -> int | None:
    """The score in the last line of a judge's reply; None if that line is anything else."""
    match = re.fullmatch(r"Score: ([1-5])", reply.rstrip().rpartition("\n")[2].strip())
    return int(match[1]) if match else None


def curate(source: Source, folder: Path, args: Any) -> dict[str, int]:
    """Write the pairs with their scores, and those to keep at each threshold; return the counts.

    Raises:
        EasyAiraError: as `ask`.
    """
    settings = {"step": "curate", "pairs": sources.content_key(source), "rubric": question("", "")}
    ask.ask(_questions(source), folder, settings, args)
    with sets.writing(folder):
        return _write(folder)


def _questions(source: Source) -> Iterator[ask.Question]:
    for number, (place, row, instruction, answer, fault) in enumerate(exchanges(source)):
        columns = {"pair": {"prompt": instruction, "completion": answer}}
        columns["pair"] |= {"text_id": row.get("text_id", number)}
        yield ask.Question(place, question(instruction, answer), columns, fault)


def _write(folder: Path) -> dict[str, int]:
    """Read the scores, and sort the pairs by them."""
    counts: Counter = Counter()
    with sets.new_sets(folder, (NOT_SCORED, *KEPT.values(), SCORED)) as put:
        for row in sets.rows_of(folder / ask.NOT_ASKED):
            put(NOT_SCORED, {**row["pair"], "fault": row["fault"]})
            counts[row["fault"]] += 1
        for row in sets.rows_of(folder / ask.ANSWERS):
            score = score_of(row["generated"])
            fault = ask.CUT if row["finish_reason"] == "length" else None
            fault = fault or (UNPARSABLE if score is None else None)
            if fault is not None:
                put(NOT_SCORED, {**row["pair"], "fault": fault, "judge": row["generated"]})
                counts[fault] += 1
                continue
            scored = {**row["pair"], "score": score}
            put(SCORED, scored | {"judge": row["generated"]})
            counts[f"score {score}"] += 1
            for threshold, name in KEPT.items():
                if score >= threshold:
                    put(name, scored)
        rated = {score: counts[f"score {score}"] for score in range(1, 6)}
        numbers = {"pairs": counts.total(), SCORED: sum(rated.values())}
        numbers |= {
            name: sum(n for score, n in rated.items() if score >= threshold)
            for threshold, name in KEPT.items()
        }
        numbers |= {name: counts[name] for name in sorted(counts)}
        sets.write_counts(folder, numbers)
    return numbers
