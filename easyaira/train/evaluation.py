"""Metrics of the held-out examples, and answers to a few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from easyaira.data.batches import Batches
from easyaira.train import loader, metrics
from easyaira.train.best import Best
from easyaira.train.saving import Stop, due
from easyaira.train.step import Summary


class Evaluation(NamedTuple):
    """Held-out metrics, named eval_...; incomplete if a signal interrupted the evaluation."""

    metrics: dict[str, float | None]
    complete: bool = True


class Evaluate:
    """Evaluates every `every` updates and after the last.

    Args:
        step: (params, frozen, arrays) -> (sums, per-example values).
        held_out: examples in micro-batches; None: no evaluation.
        summary: further metrics, over all examples together.
        answer: (number of updates, params, whether to stop) -> False if interrupted; answers
            prompts, before the first update and after the last even if nothing is held out.
        stop: checked after each batch; interrupts the evaluation.
        best: compares each evaluation with the best so far.
        stage: shows the current work.
        own: (params, whether to stop) -> metrics, or None if interrupted; in the place of `step`.
        cycle: evaluations are postponed to the end of a cycle of this many updates.
    """

    def __init__(
        self,
        step: Callable,
        held_out: Batches | None,
        mesh: Mesh,
        *,
        every: int,
        until: int,
        summary: Summary | None = None,
        answer: Callable[[int, Any, Callable[[], bool]], bool],
        stop: Stop,
        best: Best,
        stage: Callable[[str], None] = lambda _: None,
        own: Callable[[Any, Callable[[], bool]], dict[str, float] | None] | None = None,
        cycle: int = 1,
    ):
        self.step, self.held_out, self.mesh = step, held_out, mesh
        self.every, self.until, self.best = every, until, best
        self.summary, self.answer, self.stop = summary, answer, stop
        self.stage, self.own, self.cycle = stage, own, cycle

    def due(self, number: int) -> bool:
        measured = self.held_out is not None or self.own
        return due(number, self.every if measured else 0, self.until, self.cycle)

    def __call__(self, number: int, params: Any, frozen: Any) -> Evaluation:
        """Measure, and compare with the best so far."""
        evaluation = self.measure(number, params, frozen)
        if evaluation.complete:
            self.best.look(number, evaluation.metrics)
        return evaluation

    def measure(self, number: int, params: Any, frozen: Any) -> Evaluation:
        """Average over all held-out examples; skipped if the run is about to stop."""
        if self.stop.stopping or not self.answer(number, params, self.stop.look_now):
            return Evaluation({}, complete=False)
        row: dict[str, float | None] = {}
        if self.own or self.held_out is not None:
            self.stage("evaluating held-out examples")
        if self.own:
            of_answers = self.own(params, self.stop.look_now)
            return Evaluation(row | (of_answers or {}), complete=of_answers is not None)
        if self.held_out is None:
            return Evaluation({})
        sums: metrics.Sums = {}
        known: dict[str, list[np.ndarray]] = {}
        count = len(self.held_out)
        for ready in loader.ahead(self.held_out, 0, count, self.mesh, "of the evaluation"):
            batch_sums, examples = jax.device_get(self.step(params, frozen, ready.arrays))
            if self.stop.look_now():
                return Evaluation({}, complete=False)
            sums = metrics.add(sums, batch_sums)
            for name, values in examples.items():
                known.setdefault(name, []).append(values[ready.batch.slots[:, 1]])
        row |= metrics.averages(sums, "eval_")
        if self.summary is not None:
            of_all = {name: np.concatenate(parts) for name, parts in known.items()}
            row |= {f"eval_{name}": value for name, value in self.summary(of_all).items()}
        return Evaluation(row)
