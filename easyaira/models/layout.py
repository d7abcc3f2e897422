"""Sides: which tokens of a row belong to which answer of their segment.

Side 0 is a prompt that all answers of the segment see, or a text without answers beside it; side
k + 1 is answer k. `models.attention.visible` says what follows from them.
"""

UNATTENDED = -1  # side of tokens that no token attends to
