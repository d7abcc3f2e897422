"""Bounded numbers as option types; none of them may be infinite."""

from __future__ import annotations

from jsonargparse.typing import restricted_number_type

FINITE = ("<", float("inf"))
NonNegative = restricted_number_type("NonNegative", float, [(">=", 0.0), FINITE])
Positive = restricted_number_type("Positive", float, [(">", 0.0), FINITE])
Share = restricted_number_type("Share", float, [(">=", 0.0), ("<", 1.0)])
HalfShare = restricted_number_type("HalfShare", float, [(">=", 0.0), ("<", 0.5)])
TopP = restricted_number_type("TopP", float, [(">", 0.0), ("<=", 1.0)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
MaxSteps = restricted_number_type("MaxSteps", int, [(">=", -1), ("!=", 0)])
