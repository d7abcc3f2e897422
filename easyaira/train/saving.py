"""Saving checkpoints, and stopping on signals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from easyaira.distributed import hosts, watchdog
from easyaira.distributed.signals import StopSignal
from easyaira.errors import Preempted
from easyaira.storage.checkpoints import Checkpoints
from easyaira.train.step import State


def due(number: int, every: int, until: int, cycle: int = 1) -> bool:
    """True every `every` updates (0: never), delayed to the end of a cycle, and after the last."""
    if number == until:
        return True
    return bool(every) and number % cycle == 0 and number // every > (number - cycle) // every


class Save:
    """Saves a checkpoint every `every` updates and after the last.

    Args:
        meta: stored with each checkpoint.
        seed: seed of the data order; stored with the position in the data.
        cycle: updates between two states that a run can resume from.
        saved: (parameters, optimizer state) -> what a checkpoint stores of them.

    Attributes:
        last: the newest saved update, or the one that the run started from.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        start: int,
        every: int,
        until: int,
        meta: dict[str, Any],
        seed: int,
        cycle: int = 1,
        saved: Callable[[Any, Any], tuple[Any, Any]] = lambda *both: both,
    ):
        self.checkpoints, self.meta, self.seed = checkpoints, meta, seed
        self.every, self.until, self.cycle, self.last = every, until, cycle, start
        self.saved = saved

    def due(self, number: int) -> bool:
        return due(number, self.every, self.until, self.cycle)

    def __call__(self, number: int, state: State, window: dict[str, Any]) -> None:
        """Start saving; the state may be donated as soon as this returns."""
        position = {"seed": self.seed, "update": number}
        meta = self.meta | {"window": window}
        self.last = number
        self.checkpoints.save(number, *self.saved(state.params, state.opt_state), position, meta)

    def wait(self) -> None:
        watchdog.beat("saving")
        self.checkpoints.wait()


class Stop:
    """Makes all hosts agree to stop when any of them received a signal.

    Args:
        cycle: updates between two states that a run can resume from.

    Attributes:
        stopping: the loop ends after the current update.
    """

    def __init__(self, signal: StopSignal, mesh: Mesh, until: int, cycle: int = 1):
        self.signal, self.mesh, self.until, self.cycle = signal, mesh, until, cycle
        self.stopping = False
        self._asked: Any = False  # all-reduced flag of the previous update

    def defer(self) -> None:
        """Defer signals to the end of the update: from now on there is a state to save."""
        self.signal.deferred = True

    def look(self, number: int) -> None:
        """Check for signals, once an update; they take effect at the end of a cycle. With several
        hosts the flag is all-reduced asynchronously, so it takes effect one update late."""
        previous, self._asked = self._asked, hosts.any_of(bool(self.signal.received), self.mesh)
        asked = bool(previous if hosts.several() else self._asked)
        self.stopping = asked and number % self.cycle == 0

    def look_now(self) -> bool:
        """Check for signals between batches of an evaluation; waits for the other hosts."""
        if hosts.any_of(bool(self.signal.received), self.mesh):
            self.stopping = True
        return self.stopping

    def raise_if_stopped(self, number: int) -> None:
        """Raises:
        Preempted: a signal was received, even if after the last update.
        """
        self.signal.deferred = False
        received = self.signal.received
        signal = hosts.problem_of_any(received) if self.stopping else received
        if signal:
            raise Preempted(
                f"{signal} after update {number} of {self.until}; the state is saved, run the same "
                "command again"
            )
