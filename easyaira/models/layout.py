"""Sides: which tokens of a row belong to which answer of their segment.

Side 0 is a prompt that all answers of the segment see, or a text without answers beside it; side
k + 1 is answer k. `models.attention.visible` makes the attention mask from them.
"""

from typing import Any

UNATTENDED = -1  # side of tokens that no token attends to


def sees(query_segment: Any, key_segment: Any, query_side: Any, key_side: Any) -> Any:
    """Whether a query sees a key, apart from causality and windows: keys of its own segment with
    side 0 (the shared prompt) or its own side, but no padding or unattended keys. Arrays are
    broadcast."""
    own_side = (key_side == 0) | ((key_side == query_side) & (key_side != UNATTENDED))
    return (query_segment == key_segment) & (key_segment > 0) & own_side
