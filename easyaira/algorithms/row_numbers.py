"""Labels, margins, weights and ranks of examples, from columns of the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from easyaira.data.examples import Examples
from easyaira.train.setup import Setup

NAMES = ("labels", "margins", "weights", "ranks")


def _parts(setup: Setup) -> list[Examples]:
    """The training examples, and the held-out ones if there are any."""
    return [part.examples for part in (setup.batches, setup.held_out) if part]


def names_of(setup: Setup) -> list[str]:
    """Names of the numbers that some row has; ranks are those of more than two answers."""
    parts = _parts(setup)
    names = [n for n in NAMES[:-1] if not all(np.isnan(getattr(part, n)).all() for part in parts)]
    return [*names, "ranks"] if setup.batches.examples.answers > 2 else names


def shapes_of(setup: Setup) -> dict[str, tuple[int, ...]]:
    """Per-example shapes of these numbers."""
    return {n: getattr(setup.batches.examples, n).shape[1:] for n in names_of(setup)}


def known_of(
    setup: Setup, names: Sequence[str], *, margin: float = 0.0
) -> list[dict[str, np.ndarray]]:
    """Numbers of the training and the held-out examples; a row without them has this margin and
    weight 1."""
    defaults = {"labels": np.float32(0), "margins": np.float32(margin), "weights": np.float32(1)}
    known: list[dict[str, np.ndarray]] = [{}, {}]
    for own, part in zip(known, _parts(setup), strict=False):
        for name in names:
            values = getattr(part, name)
            default = defaults.get(name)
            own[name] = values if default is None else np.where(np.isnan(values), default, values)
    return known
