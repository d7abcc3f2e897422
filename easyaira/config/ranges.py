"""Bounded numbers as option types."""

from __future__ import annotations

from jsonargparse.typing import restricted_number_type

Share = restricted_number_type("Share", float, [(">=", 0.0), ("<", 1.0)])
HalfShare = restricted_number_type("HalfShare", float, [(">=", 0.0), ("<", 0.5)])
TopP = restricted_number_type("TopP", float, [(">", 0.0), ("<=", 1.0)])
Temperature = restricted_number_type("Temperature", float, [(">=", 0.0), ("<", float("inf"))])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
MaxSteps = restricted_number_type("MaxSteps", int, [(">=", -1), ("!=", 0)])
