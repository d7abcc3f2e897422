"""Mismatched answers: each prompt with its own answer and with that of another prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from easyaira.data.examples import Examples
from easyaira.errors import DataError


def mismatched(examples: Examples, group: int, *, max_length: int, seed: int) -> Examples:
    """Shuffle examples of one answer into groups, and give each a second answer: the answer of the
    example before it in its group, cut where prompt and answer exceed `max_length` tokens.

    So a group has the same answers as first and as second ones, as the estimate of the KL
    divergence in Ethayarajh et al. (2024), KTO, requires. Groups stay the same in all epochs. The
    tokens are copied into memory; up to `group` - 1 examples are left out.

    Raises:
        DataError: there are fewer examples than a group has.
    """
    count = len(examples) // group * group
    if not count:
        raise DataError(
            f"data: {len(examples)} rows are fewer than a group of {group}; add rows, or lower "
            "dpo.kto_group"
        )
    if left := len(examples) - count:
        print(f"data    {left} of {len(examples)} rows left out: groups of {group}", flush=True)
    order = np.random.default_rng([seed, 3]).permutation(len(examples))[:count]
    chosen = examples.take(order)
    partner = np.roll(np.arange(count).reshape(-1, group), 1, axis=1).ravel()
    prompt, answer, end = chosen.bounds.T
    room = max_length - (answer - prompt)
    ends = np.minimum(end[partner], answer[partner] + room)
    starts = np.stack([prompt, answer, answer[partner]], axis=1).ravel()
    lengths = np.stack([answer, end, ends], axis=1).ravel() - starts
    edges = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(edges[-1]) + np.repeat(starts - edges[:-1], lengths)
    return replace(
        chosen,
        tokens=examples.tokens[index],
        learned=examples.learned[index],
        bounds=np.concatenate([edges[:-1].reshape(-1, 3), edges[3::3, None]], axis=1),
        ranks=np.tile(np.arange(2, dtype=np.int16), (count, 1)),
        ids=chosen.ids * np.uint64(3) ^ chosen.ids[partner],
    )
