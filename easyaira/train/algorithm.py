"""What an algorithm provides to a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from easyaira.data.recipe import Recipe
from easyaira.models.model import Model
from easyaira.train.step import LossFn, Summary

if TYPE_CHECKING:
    from easyaira.train.setup import Setup


class Beginning(NamedTuple):
    """What an algorithm computes before the first update.

    Attributes:
        frozen: weights that the step takes and does not train.
        known, known_held_out: name -> [n, ...] what is known of each example.
        metrics: before the first update.
    """

    frozen: Any = None
    known: Mapping[str, np.ndarray] = {}
    known_held_out: Mapping[str, np.ndarray] = {}
    metrics: Mapping[str, float] = {}


class Algorithm(NamedTuple):
    """What makes a run SFT, DPO or a reward model.

    Attributes:
        recipe: what becomes of a row, given the longest example in tokens.
        loss_fn: Setup -> the loss function.
        frozen: Setup -> the model whose weights the step takes as frozen, or None.
        begin: (Setup, params, run folder, first time?) -> Beginning.
        scorer: the model gives a text one number, and does not write.
        known: Setup -> name -> shape of what `begin` will say of each example.
        summary: what is told of all held-out examples together (see train.step.PER_EXAMPLE).
    """

    recipe: Callable[[int], Recipe]
    loss_fn: Callable[[Setup], LossFn]
    frozen: Callable[[Setup], Model | None]
    begin: Callable[[Setup, Any, Path, bool], Beginning]
    scorer: bool = False
    known: Callable[[Setup], Mapping[str, tuple[int, ...]]] = lambda setup: {}
    summary: Summary | None = None
