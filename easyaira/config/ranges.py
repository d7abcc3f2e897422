"""Bounded numbers as option types.

Fractions are computed in float32 and counts in int32, so no option may overflow them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jsonargparse.typing import restricted_number_type

from easyaira.errors import ConfigError, shortened

WORDS = {  # name of a type -> its values, for messages
    "PositiveInt": "a whole number from 1",
    "str": "text (quoted in a file)",
    "list": "a list such as [a, b]",
    "bool": "true or false",
    "LoraConfig": "options as `name: value`",
    "EnergyConfig": "options as `name: value`",
}
LARGEST = 3e38  # in float32
SMALLEST = 1e-37  # smaller numbers are 0 on some devices


def _number(name: str, kind: type, words: str, *bounds: tuple[str, float]) -> Any:
    WORDS[name] = words
    return restricted_number_type(name, kind, list(bounds))


NonNegative = _number("NonNegative", float, "a number from 0 to 3e38", (">=", 0.0), ("<=", LARGEST))
Number = _number("Number", float, "a number from -3e38 to 3e38", (">=", -LARGEST), ("<=", LARGEST))
Positive = _number(
    "Positive", float, "a number above 0 (1e-37 to 3e38)", (">=", SMALLEST), ("<=", LARGEST)
)
Weight = _number("Weight", float, "a number above 0, up to 1000", (">=", SMALLEST), ("<=", 1e3))
Share = _number("Share", float, "a number from 0, below 1", (">=", 0.0), ("<", 1.0))
HalfShare = _number("HalfShare", float, "a number from 0, below 0.5", (">=", 0.0), ("<", 0.5))
# 1 - 1e-8 is 1 in float32, and a mean that decays by 1 never moves
Decay = _number("Decay", float, "a number from 0 to 0.999999", (">=", 0.0), ("<=", 0.999999))
TopP = _number("TopP", float, "a number above 0, up to 1", (">=", SMALLEST), ("<=", 1.0))
Seed = _number("Seed", int, "a whole number from 0, below 2**32", (">=", 0), ("<", 2**32))
Count = _number("Count", int, "a whole number from 1, below 2**31", (">=", 1), ("<", 2**31))
CountOrZero = _number(
    "CountOrZero", int, "a whole number from 0, below 2**31", (">=", 0), ("<", 2**31)
)
MaxSteps = _number(
    "MaxSteps",
    int,
    "-1, or a whole number from 1, below 2**31",
    (">=", -1),
    ("!=", 0),
    ("<", 2**31),
)


def bytes_of(size: str | None) -> float | None:
    """Bytes of a size such as 12GiB.

    Raises:
        ConfigError: it is no size.
    """
    if size is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB|MB)", size)
    if not match or not float(match[1]):
        raise ConfigError(f"--memory: expected a size such as 12GiB, got {shortened(size)}")
    return float(match[1]) * {"GiB": 2**30, "GB": 1e9, "MiB": 2**20, "MB": 1e6}[match[2]]


def refuse_others(group: str, options: Any, others: Mapping[str, str]) -> None:
    """Check that options which do not apply keep their defaults.

    Args:
        group: name of the options, such as dpo.
        options: a dataclass.
        others: options that do not apply, and what each applies to.

    Raises:
        ConfigError: one is set.
    """
    for field in fields(options):
        if field.name in others and getattr(options, field.name) != field.default:
            raise ConfigError(
                f"{group}.{field.name}: applies to {others[field.name]} only; leave it out"
            )
