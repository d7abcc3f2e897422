"""The interface between an algorithm and a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from easyaira.data.examples import Examples
from easyaira.data.recipe import Recipe
from easyaira.models.model import Model
from easyaira.train.step import LossFn, Summary

if TYPE_CHECKING:
    from easyaira.train.setup import Setup


class Beginning(NamedTuple):
    """Results that an algorithm computes before the first update.

    Attributes:
        frozen: weights that the step takes and does not train.
        known, known_held_out: name -> [n, ...], further arrays with one entry per example.
        metrics: logged before the first update.
    """

    frozen: Any = None
    known: Mapping[str, np.ndarray] = {}
    known_held_out: Mapping[str, np.ndarray] = {}
    metrics: Mapping[str, float] = {}


class OnPolicy(NamedTuple):
    """Batches that the current weights make, by answering the prompts of the data.

    Attributes:
        largest: (prompts, answers of an example) -> examples of the largest update, with answers as
            long as allowed.
        together: answers of a micro-batch on a device -> numbers of a prompt's answers that an
            example may hold, the least first.
        epoch: prompts -> updates in an epoch.
        cycle: updates per rollout; a run can resume only between rollouts.
        source: (Setup, run folder, first update, whether to stop) -> source of batches, see
            loader.Stored.
    """

    largest: Callable[[Examples, int], Examples]
    together: Callable[[int], list[int]]
    epoch: Callable[[Examples], int]
    cycle: int
    source: Callable[[Setup, Path, int, Callable[[], bool]], Any]


class Algorithm(NamedTuple):
    """Everything that distinguishes SFT, DPO, reward modelling and on-policy training.

    Attributes:
        recipe: longest example in tokens -> how rows become examples.
        loss_fn: Setup -> the loss function.
        frozen: Setup -> model of the step's frozen weights, or None.
        begin: (Setup, params, run folder, first start of the run?) -> Beginning.
        scorer: the model scores texts and does not generate them.
        known: Setup -> name -> per-example shape of the arrays that `begin` returns as `known`.
        summary: metrics over all held-out examples together (see train.step.PER_EXAMPLE).
        on_policy: where batches come from if not from stored examples.
        arrange: (examples of the rows, max_length) -> those to train on.
        together: consecutive examples that stay together on a device.
        balanced: the loss balances the experts, which the model must have.
        critic: (Resolved, mesh) -> the value model to train, and its learning rate.
    """

    recipe: Callable[[int], Recipe]
    loss_fn: Callable[[Setup], LossFn]
    frozen: Callable[[Setup], Model | None]
    begin: Callable[[Setup, Any, Path, bool], Beginning]
    scorer: bool = False
    known: Callable[[Setup], Mapping[str, tuple[int, ...]]] = lambda setup: {}
    summary: Summary | None = None
    on_policy: OnPolicy | None = None
    arrange: Callable[[Examples, int], Examples] = lambda examples, max_length: examples
    together: int = 1
    balanced: bool = False
    critic: Callable[[Any, Any], Any] | None = None
