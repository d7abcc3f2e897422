"""Answers to a few held-out prompts, before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from easyaira.distributed import hosts
from easyaira.errors import StorageError
from easyaira.files import read_json, write_file
from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import generate
from easyaira.generation.settings import end_ids, files_of
from easyaira.train.setup import Setup

SAMPLE_TOKENS = 64


class Samples:
    """The first held-out prompts (training prompts if nothing is held out) and their answers.

    Args:
        file: samples.json of the run folder; answers of an interrupted run are kept.
    """

    def __init__(self, setup: Setup, file: Path):
        self.setup, self.file = setup, file
        shown = setup.data.held_out or setup.data.train
        self.prompts, self.rows = [], []
        bounds = shown.bounds[shown.bounds[:, 1] > shown.bounds[:, 0]]  # not without a prompt
        for prompt, answer, end, *_ in bounds[: setup.config.num_samples]:
            self.prompts.append(shown.tokens[prompt:answer])
            text = setup.template.text
            self.rows.append(
                {
                    "prompt": text(shown.tokens[prompt:answer]),
                    "wanted": text(shown.tokens[answer:end]),
                }
            )
        if hosts.first() and file.exists():
            self._recall()

    def _recall(self) -> None:
        """Take over the answers of an interrupted run to the same prompts."""
        try:
            saved = read_json(self.file, list, error=StorageError)
            if not all(isinstance(row, dict) and _texts(row) for row in saved):
                raise StorageError(f"{self.file}: expected prompts and answers")
        except StorageError as error:
            print(f"warning: {error}; answers before training are left out", flush=True)
            return
        for row in self.rows:
            row |= next((old for old in saved if row.items() <= old.items()), {})

    def answer(self, when: str, params: Any) -> None:
        """Answer all prompts greedily with these weights, and save the answers."""
        if not self.prompts:
            return
        setup = self.setup
        foreign = setup.config.model.tokenizer is not None  # the files have ids of another one
        files = {} if foreign else files_of(setup.origin)
        ends = end_ids(setup.template, files, setup.model.vocab_size)
        sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, end_ids=tuple(ends))
        answers = generate(setup.model, params, self.prompts, sampling)
        for row, answer in zip(self.rows, answers, strict=True):
            row[when] = self.setup.template.text(answer.content)
        if hosts.first():
            write_file(self.file, json.dumps(self.rows, indent=2, ensure_ascii=False) + "\n")


def _texts(row: dict[str, Any]) -> bool:
    known = {"prompt", "wanted", "before", "after"}
    return row.keys() <= known and all(isinstance(text, str) for text in row.values())
