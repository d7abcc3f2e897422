"""Statistics of pairs that show, before a run, how much it can learn from them."""

from __future__ import annotations

import numpy as np

from easyaira.data.examples import Examples

LOOKED_AT = 2000  # pairs whose tokens are compared
TAIL, FEWEST = 0.5, 5  # share of the shorter answer, and tokens


def statistics(pairs: Examples) -> dict[str, int]:
    """Counts over all pairs, and of common ends over at most LOOKED_AT of them, evenly spread.

    Returns:
        pairs: their number.
        repeats: copies of other pairs, not counting those made by a source's weight.
        chosen longer, rejected longer: pairs in which this answer has more tokens.
        chosen tokens, rejected tokens: in all answers.
        compared, common ends: pairs looked at, and those whose answers differ by their beginnings
            alone: TAIL of the shorter one or more, at least FEWEST tokens, also ends the longer.
    """
    lengths = np.diff(pairs.bounds[:, 1:])
    chosen, rejected = lengths.T
    places = np.stack([pairs.sources.astype(np.int64), pairs.rows], axis=1)
    looked_at = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), LOOKED_AT), dtype=int))
    return {
        "pairs": len(pairs),
        "repeats": len(np.unique(places, axis=0)) - len(np.unique(pairs.ids)),
        "chosen longer": int((chosen > rejected).sum()),
        "rejected longer": int((rejected > chosen).sum()),
        "chosen tokens": int(chosen.sum()),
        "rejected tokens": int(rejected.sum()),
        "compared": len(looked_at),
        "common ends": sum(_common_end(pairs, i) for i in looked_at),
    }


def _common_end(pairs: Examples, i: int) -> bool:
    """Whether both answers end alike, apart from the end token."""
    _, begin, middle, end = pairs.bounds[i]
    chosen, rejected = pairs.tokens[begin:middle][::-1], pairs.tokens[middle:end][::-1]
    if chosen[0] == rejected[0]:  # the end token, unless both are cut
        chosen, rejected = chosen[1:], rejected[1:]
    shorter = min(len(chosen), len(rejected))
    differ = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
    alike = int(differ[0]) if len(differ) else shorter
    return alike >= max(TAIL * shorter, FEWEST)
