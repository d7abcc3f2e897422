"""Synthetic examples with the length distributions of real data."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from easyaira.data.examples import PER_EXAMPLE, Examples, Parts, of_parts
from easyaira.losses.preference import pairs_of


class Kind(NamedTuple):
    """Lengths in tokens.

    Attributes:
        prompt, answer: median and spread of a log-normal distribution.
        longest: length of the longest example.
        max_length: max_length of runs on such data; a naive step pads to it.
    """

    prompt: tuple[int, float]
    answer: tuple[int, float]
    longest: int
    max_length: int


KINDS = {
    "aira": Kind((25, 0.4), (200, 0.5), 400, 600),  # no example exceeds 400; the recipe says 600
    "chat": Kind((80, 0.6), (150, 0.7), 600, 600),
    "hh": Kind((150, 0.8), (60, 0.7), 1024, 1024),
    "ultrafeedback": Kind((120, 0.9), (280, 0.7), 2048, 2048),
}


def synthetic(kind: str, rows: int, answers: int, folder: Path, longest: int) -> Examples:
    """Examples of so many answers with log-normal lengths, cut to `longest` tokens; tokens on disk,
    fixed seed."""
    rng = np.random.default_rng(0)
    (prompt, prompt_spread), (answer, answer_spread) = KINDS[kind][:2]
    medians = [prompt] + [answer] * answers
    spreads = [prompt_spread] + [answer_spread] * answers
    lengths = rng.lognormal(np.log(medians), spreads, (rows, len(medians))).astype(np.int64) + 1
    lengths[:, 0] = np.minimum(lengths[:, 0], longest // 2)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], longest - lengths[:, :1])
    starts = np.concatenate([[0], np.cumsum(lengths.ravel())])
    per_row = lengths.shape[1]
    bounds = starts[np.arange(rows)[:, None] * per_row + np.arange(per_row + 1)]
    arrays = {name: np.zeros(rows, dtype) for name, dtype in PER_EXAMPLE.items()}
    arrays["rows"] = np.arange(rows)
    arrays["ranks"] = np.tile(np.arange(answers, dtype=np.int16), (rows, 1))
    for name, dtype in (("tokens", np.int32), ("learned", np.bool_)):
        file, total = folder / f"{kind}-{answers}-{name}", int(starts[-1])
        with open(file, "wb") as stream:  # a full disk: an error here, a crash in a memory map
            for begin in range(0, total, 10**7):
                rng.integers(0, 2, min(10**7, total - begin)).astype(dtype).tofile(stream)
        arrays[name] = np.memmap(file, dtype, "r+").view(np.ndarray)
    return Examples(**arrays | {"bounds": bounds})


def written_out(examples: Examples, best_rest: bool) -> Examples:
    """Each pair of a prompt's answers as an example of its own, in order."""
    pairs, parts = pairs_of(examples.answers, best_rest), []
    for bounds in examples.bounds.tolist():
        spans = [slice(a, b) for a, b in pairwise(bounds)]
        prompt, *own = [(examples.tokens[at], examples.learned[at]) for at in spans]
        parts += [Parts(*prompt, [own[i], own[j]]) for i, j in pairs]
    return of_parts(parts)
