"""Rejection sampling: the best and the worst of the answers to each prompt, in files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from easyaira.config.data import Source
from easyaira.data import columns, sources
from easyaira.errors import DataError
from easyaira.generation.prompts import check_free
from easyaira.generation.sets import new_sets, rows_of, write_counts
from easyaira.rewards.model import RewardModel

ANSWERS, SCORED, SFT, DPO = "answers.jsonl", "scored.jsonl", "sft.jsonl", "dpo.jsonl"
PROMPTS = 64  # scored at a time


class Candidate(NamedTuple):
    """An answer with its scores.

    Attributes:
        reason: `length` if it was cut.
        toxicity: score of a toxicity model, below 0 for toxic texts; None: not measured.
    """

    text: str
    reason: str
    score: float
    toxicity: float | None = None

    @property
    def fault(self) -> str | None:
        """Why it cannot be learned; None if it can."""
        if self.reason == "length":
            return "cut"
        if not self.text.strip():
            return "empty"
        return "toxic" if self.toxicity is not None and self.toxicity < 0 else None


def select(
    candidates: Sequence[Candidate], counts: Counter
) -> tuple[Candidate | None, Candidate | None]:
    """The best answer that can be learned, and the worst one to pair it with.

    The worst one may be toxic, but neither cut nor empty: its end is learned, too. Among equal
    scores, the first one wins.

    Args:
        counts: counts the faults, and prompts without a best answer or without a worse one.
    """
    counts.update(c.fault for c in candidates if c.fault)
    whole = [c for c in candidates if c.fault in (None, "toxic")]
    best = max((c for c in whole if not c.fault), key=lambda c: c.score, default=None)
    if best is None:
        counts["prompts without a usable answer"] += 1
        return None, None
    worst = min(whole, key=lambda c: c.score)
    if worst.score >= best.score or worst.text.strip() == best.text.strip():
        counts["prompts without a worse answer"] += 1
        return best, None
    return best, worst


def questions(path: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Place and messages of each prompt of a file.

    Raises:
        DataError: a row is unreadable, or has a column of the output.
    """
    for place, row in sources.read(Source(path)):
        try:
            if isinstance(row, sources.BadRow):
                raise columns.Unreadable(row.reason)
            check_free(row, ("score", "toxicity_score"))
            yield place, columns.question(columns.Record(row))
        except columns.Unreadable as error:
            raise DataError(f"{place}: {error}") from error


def complete(folder: Path) -> bool:
    """Whether all answers are scored. More prompts in the file add answers that are not."""
    if not (folder / SCORED).exists():
        return False
    answers, scores = (sum(1 for _ in rows_of(folder / name)) for name in (ANSWERS, SCORED))
    return answers == scores


def write(folder: Path, num_samples: int, models: Sequence[RewardModel]) -> Mapping[str, Any]:
    """Score the answers, and write the sets; return the counts.

    Args:
        models: the reward model, and the toxicity model if there is one.
    """
    counts: Counter = Counter()
    sums = {"all": 0.0, "the best": 0.0}
    names = (DPO, SFT, SCORED)  # renamed in this order: if SCORED exists, all do
    with new_sets(folder, names) as write_row:

        def put(name: str, row: Mapping[str, Any]) -> None:
            write_row(name, row)
            counts[name] += 1

        for messages, rows, candidates in scored(folder / ANSWERS, num_samples, models):
            counts["prompts"] += 1
            for row, candidate in zip(rows, candidates, strict=True):
                put(SCORED, row | _scores(candidate))
                sums["all"] += candidate.score
            plain = len(messages) == 1 and messages[0]["role"] == "user"
            prompt = {"prompt": messages[0]["content"] if plain else messages}
            best, worst = select(candidates, counts)
            if best:
                put(SFT, prompt | {"completion": best.text} | _scores(best))
                sums["the best"] += best.score
            if best and worst:
                pair = {"chosen": best.text, "rejected": worst.text}
                put(DPO, prompt | pair | _scores(best, "chosen_") | _scores(worst, "rejected_"))
        of = {"all": counts[SCORED], "the best": counts[SFT]}
        means = {
            f"mean score of {name}": total / of[name] if of[name] else None
            for name, total in sums.items()
        }
        numbers = {name: counts[name] for name in ("prompts", *names)} | dict(counts) | means
        write_counts(folder, numbers)
    return numbers


def _scores(candidate: Candidate, prefix: str = "") -> dict[str, float]:
    scores = {"score": candidate.score, "toxicity_score": candidate.toxicity}
    return {prefix + name: value for name, value in scores.items() if value is not None}


def scored(
    path: Path, num_samples: int, models: Sequence[RewardModel]
) -> Iterator[tuple[list[columns.Message], list[dict[str, Any]], list[Candidate]]]:
    """Messages of each prompt, the rows of its answers, and the answers as Candidates."""
    reward, *rest = models
    rows = rows_of(path)
    bar = tqdm(desc="scoring", unit="answer", disable=None)
    while chunk := list(islice(rows, num_samples * PROMPTS)):
        asked = [columns.question(columns.Record(row)) for row in chunk]
        texts = [row["generated"] for row in chunk]
        conversations = [
            [*messages, {"role": "assistant", "content": text}]
            for messages, text in zip(asked, texts, strict=True)
        ]
        scores = reward.of_answers(conversations)
        toxicity = rest[0].of_texts(texts) if rest else [None] * len(texts)
        bar.update(len(chunk))
        candidates = [
            Candidate(text, row["finish_reason"], float(s), None if t is None else float(t))
            for text, row, s, t in zip(texts, chunk, scores, toxicity, strict=True)
        ]
        for start in range(0, len(chunk), num_samples):
            part = slice(start, start + num_samples)
            yield asked[start], chunk[part], candidates[part]
    bar.close()
