"""Answers to a few held-out prompts, before training and at every evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from easyaira.distributed import hosts, watchdog
from easyaira.errors import StorageError
from easyaira.files import read_json, write_file
from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import Answer, Sampler
from easyaira.generation.settings import end_ids, files_of
from easyaira.train.log import Log, NoLog
from easyaira.train.setup import Setup

SAMPLE_TOKENS = 64
CUT = " ..."  # after a text that was cut


class Samples:
    """The first held-out prompts (training prompts if nothing is held out) and their answers.

    Args:
        file: samples.json of the run folder; its answers up to `start` are kept.
        start: update that the run starts from.
        log: shows that prompts are being answered, and passes the answers to trackers.

    Attributes:
        rows: for each prompt `prompt`, `wanted` and `answers`: text by number of updates.
    """

    def __init__(
        self,
        setup: Setup,
        file: Path,
        start: int = 0,
        log: Log | NoLog | None = None,
    ):
        self.setup, self.file, self.log = setup, file, log or NoLog()
        shown = setup.data.held_out or setup.data.train
        self.prompts, self.rows = [], []
        asked = shown.bounds[:, 1] - shown.bounds[:, 0] > len(setup.template.first)
        bounds = shown.bounds[asked]  # not without a prompt
        longest = setup.data.report["recipe"]["max_length"]
        for prompt, answer, end, *_ in bounds[: setup.config.num_samples]:
            self.prompts.append(shown.tokens[prompt:answer].tolist())
            text = setup.template.text
            ended = end - prompt < longest or shown.tokens[end - 1] in setup.template.end_ids
            row = {
                "prompt": text(shown.tokens[prompt:answer]),
                "wanted": text(shown.tokens[answer:end]) + ("" if ended else CUT),
            }
            self.rows.append(row | {"answers": {}})
        if hosts.first() and file.exists() and start:
            self._recall(start)
        self.sampler: Sampler | None = None  # compiled once

    def _recall(self, start: int) -> None:
        """Take over the answers of an interrupted run to the same prompts."""
        try:
            saved = read_json(self.file, list, error=StorageError)
            if not all(isinstance(row, dict) and _fits(row) for row in saved):
                raise StorageError(f"{self.file}: expected prompts and answers")
        except StorageError as error:
            print(f"warning: {error}; its answers are left out", flush=True)
            return
        for row in self.rows:
            for old in saved:
                if (old["prompt"], old["wanted"]) == (row["prompt"], row["wanted"]):
                    answers = old["answers"].items()
                    row["answers"] = {n: text for n, text in answers if int(n) <= start}

    def __call__(self, number: int, params: Any, stopping: Callable[[], bool]) -> bool:
        """Answer all prompts greedily with the weights after `number` updates, and save the
        answers; False if `stopping` has interrupted it."""
        if not self.prompts:
            return True
        if self.sampler is None:
            self.sampler = self.make_sampler()
        watchdog.beat("sampling answers")
        self.log.stage(f"answering {len(self.prompts)} prompt{'s' * (len(self.prompts) > 1)}")
        answers: dict[int, Answer] = {}
        weights = self.sampler.weights(self.setup.trainable.weights(params))
        for i, answer in self.sampler.answers(weights, self.prompts):
            watchdog.beat(f"sampling answer {len(answers) + 1} of {len(self.prompts)}")
            if stopping():
                return False
            answers[i] = answer
        for i, row in enumerate(self.rows):
            cut = CUT if answers[i].reason == "length" else ""
            row["answers"][str(number)] = self.setup.template.text(answers[i].content) + cut
        if hosts.first():
            write_file(self.file, json.dumps(self.rows, indent=2, ensure_ascii=False) + "\n")
            texts = [f"{row['prompt']}\n\n{row['answers'][str(number)]}" for row in self.rows]
            self.log.texts(number, {f"answers/{i}": text for i, text in enumerate(texts, 1)})
        return True

    def make_sampler(self) -> Sampler:
        setup = self.setup
        foreign = setup.config.model.tokenizer is not None  # the files have another's ids
        files = {} if foreign else files_of(setup.origin)
        ends = end_ids(setup.template, files, setup.model.vocab_size)
        return Sampler(setup.model, Sampling(max_new_tokens=SAMPLE_TOKENS, end_ids=tuple(ends)))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of a table: a row for each prompt, a column for each evaluation."""
        numbers = sorted({int(n) for row in self.rows for n in row["answers"]})
        head = ["prompt", "wanted", *(f"update {n}" if n else "before" for n in numbers)]
        rows = [
            [row["prompt"], row["wanted"], *(row["answers"].get(str(n), "") for n in numbers)]
            for row in self.rows
        ]
        return head, rows


def _fits(row: dict[str, Any]) -> bool:
    answers = row.get("answers")
    if row.keys() != {"prompt", "wanted", "answers"} or not isinstance(answers, dict):
        return False
    texts = [row["prompt"], row["wanted"], *answers.values()]
    numbers = all(n.isdecimal() and len(n) < 10 for n in answers)
    return numbers and all(isinstance(text, str) for text in texts)
