"""All signs that a run shows. The report lists all of them; the terminal shows each once.

A sign is a name and a sentence with the evidence and what to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from easyaira.run import hacking, health
from easyaira.run.health_facts import of_setup
from easyaira.train.setup import Setup


class Signs:
    """Signs of one run.

    Args:
        setup: the run's.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self._shown = {*health.SHOWN_WITH_DATA}

    def of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Name -> sentence of each sign in the rows of a metrics.jsonl."""
        # a metric without a value, such as a rate before the first update, is null
        numbers = [
            {name: value for name, value in row.items() if isinstance(value, int | float)}
            for row in rows
        ]
        held_out = len(self._setup.data.held_out or ()) if self._setup else 0
        hacked = hacking.warnings(numbers, prompts=max(held_out, 1))
        return hacked | health.warnings(of_setup(self._setup, numbers))

    def new(self, signs: Mapping[str, str]) -> Iterator[str]:
        """Lines for the terminal: signs that were not shown before."""
        for name, sentence in signs.items():
            if name not in self._shown:
                self._shown.add(name)
                yield f"warning: {sentence}"
