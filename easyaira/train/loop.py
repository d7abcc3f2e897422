"""The training loop, the same for every algorithm; algorithms differ in step and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from easyaira.data.batches import Batches
from easyaira.train import loader
from easyaira.train.evaluation import Evaluate
from easyaira.train.record import Record
from easyaira.train.saving import Save, Stop
from easyaira.train.step import State


def fit(
    state: State,
    frozen: Any,
    batches: Batches,
    *,
    step: Callable,
    until: int,
    evaluate: Evaluate,
    record: Record,
    save: Save,
    stop: Stop,
) -> State:
    """Train from `state` to update `until`.

    Args:
        state: donated to the first step.
        frozen: frozen weights.
        step: (state, frozen, arrays of a batch) -> (state, sums).
        evaluate: computes held-out metrics when due.
        record: logs metrics to files and the terminal.
        save: writes checkpoints when due.
        stop: whether a signal requests a stop; agrees on every host.

    Raises:
        NonFiniteError: a loss or a gradient is not finite. The parameters are unchanged by it.
        Preempted: a signal was received; the state is saved.
        StorageError: a checkpoint could not be written.
    """
    mesh = state.step.sharding.mesh
    number = start = int(state.step)
    if record.wants_evaluation(start):
        record.before(start, evaluate(state.params, frozen))
    for number, ready in enumerate(loader.ahead(batches, start, until, mesh), start + 1):
        state, sums = step(state, frozen, ready.arrays)
        stop.defer()
        record.update(number, ready, sums)  # also fetches the previous update's sums
        stop.look()
        if evaluate.due(number):
            record.pause()
            record.evaluation(number, evaluate(state.params, frozen))
        if save.due(number) or stop.stopping:
            save(number, state, record.to_save())
        if stop.stopping:
            break
        record.resume()
    save.wait()
    stop.raise_if_stopped(number)
    return state
