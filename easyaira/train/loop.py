"""The training loop, the same for every algorithm; algorithms differ in step and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from easyaira.errors import RewardError
from easyaira.train.evaluation import Evaluate, Evaluation
from easyaira.train.loader import Ready
from easyaira.train.record import Record
from easyaira.train.saving import Save, Stop
from easyaira.train.step import State


def fit(
    state: State,
    frozen: Any,
    source: Callable[[int, Any], Ready | None],
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
        source: (update, parameters) -> its batch, see loader.Stored.
        step: (update, state, frozen, arrays of a batch) -> (state, sums).
        evaluate: computes held-out metrics when due; the loop ends when its best is exhausted.
        record: logs metrics to files and the terminal.
        save: writes checkpoints when due.
        stop: whether a signal requests a stop; agrees on every host.

    Raises:
        NonFiniteError: a loss or a gradient is not finite. The parameters are unchanged by it.
        Preempted: a signal was received; the state is saved.
        RewardError: a reward is unusable; the state is saved.
        StorageError: a checkpoint could not be written.
    """
    number = start = int(state.step)
    problem = None
    if record.wants_evaluation(start):
        record.before(start, evaluate(start, state.params, frozen))
    while number < until and not evaluate.best.exhausted:
        try:
            ready = source(number, state.params)
        except RewardError as error:
            ready, problem = None, error
        if ready is None:
            if number > save.last:
                save(number, state, record.to_save())
            break
        record.before_step(number, ready)
        state, sums = step(number, state, frozen, ready.arrays)
        number, wanted = number + 1, False
        stop.defer()
        record.update(number, ready, sums)  # also fetches the previous update's sums
        stop.look(number)
        if evaluate.due(number):
            record.pause()
            try:
                evaluation = evaluate(number, state.params, frozen)
            except RewardError as error:
                evaluation, problem = Evaluation({}, complete=False), error
            record.evaluation(number, evaluation)
            wanted = evaluate.best.improved or evaluate.best.exhausted
        ending = stop.stopping or problem is not None
        if save.due(number) or ending or wanted:
            save(number, state, record.to_save())
        if ending:
            break
        record.resume()
    save.wait()
    if problem:
        raise problem
    stop.raise_if_stopped(number)
    return state
