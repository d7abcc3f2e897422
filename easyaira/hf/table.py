"""Weight tables: pairs of EasyAira parameters and Hugging Face tensors.

A `Row` pairs a path of our parameter tree with the name of a Hugging Face tensor. `{}` in that name
is the layer's index; our parameters stack layers on axis 0. `{expert}` in both is an expert's
index. Each expert has its own parameter, so that only one is in memory where weights are read one
by one. The table is at the end of each model's file and serves both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from easyaira.distributed.tree import by_path
from easyaira.errors import WeightsError


@dataclass(frozen=True)
class Op:
    """Layout conversion of a tensor (of one layer). Both directions are views, without copies."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    vocab_axis: int | None = None  # axis of our parameter that has vocabulary padding


SAME = Op(lambda x: x, lambda x: x)
TRANSPOSE = Op(lambda x: x.T, lambda x: x.T)
VOCAB = Op(lambda x: x, lambda x: x, vocab_axis=0)
VOCAB_TRANSPOSE = Op(lambda x: x.T, lambda x: x.T, vocab_axis=1)
SPLIT_QKV = Op(  # the last axis concatenates q, k and v
    lambda x: x.reshape(*x.shape[:-1], 3, x.shape[-1] // 3),
    lambda x: x.reshape(*x.shape[:-2], -1),
)


EXPERT = "{expert}"


@dataclass(frozen=True)
class Row:
    """Our path, Hugging Face's name, the conversion, and a predicate of configs that have it; and
    whether a kernel may have an adapter, and be quantised."""

    ours: str
    theirs: str
    op: Op = SAME
    when: Callable[[Any], bool] = lambda config: True
    adaptable: bool = True
    quantizable: bool = True

    def of(self, config: Any) -> list[Row]:
        """The rows of a configuration: one for each expert, this one, or none."""
        if not self.when(config):
            return []
        if EXPERT not in self.ours:
            return [self]
        ours, theirs = self.ours, self.theirs
        return [
            replace(self, ours=ours.replace(EXPERT, str(i)), theirs=theirs.replace(EXPERT, str(i)))
            for i in range(config.num_local_experts)
        ]

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs

    def names(self, leaf: Any) -> list[str]:
        """Names of the Hugging Face tensors of our `leaf`."""
        return (
            [self.theirs.format(i) for i in range(leaf.shape[0])] if self.stacked else [self.theirs]
        )

    def cut(self, array: np.ndarray, vocab_size: int) -> np.ndarray:
        """Convert one layer to Hugging Face's layout, without vocabulary padding."""
        if self.op.vocab_axis is not None:
            array = array[:vocab_size] if self.op.vocab_axis == 0 else array[:, :vocab_size]
        return self.op.to_theirs(array)


def pair_rows(tree: Any, rows: Sequence[Row]) -> list[tuple[Row, Any]]:
    """Pair every row with its leaf.

    Raises:
        WeightsError: the table is wrong: a leaf without a row, or a row without a leaf.
    """
    leaves = by_path(tree)
    ours = [row.ours for row in rows]
    if sorted(ours) != sorted(leaves):
        raise WeightsError(
            f"weight table: rows without a parameter: {sorted(set(ours) - set(leaves))}, "
            f"parameters without a row: {sorted(set(leaves) - set(ours))}. Fix HF_ROWS in the "
            "model's file"
        )
    return [(row, leaves[row.ours]) for row in rows]
