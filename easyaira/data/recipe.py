"""The recipe: which options decide what becomes of a row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from easyaira.config.algorithms import SFTConfig
from easyaira.config.data import DataConfig
from easyaira.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """What becomes of a row; together with template and tokenizer it decides every token.

    Attributes:
        task: what a row is: a conversation to be learned, a pair of answers, a text to be judged.
        max_length: longest prompt with answer, in tokens.
        max_prompt_length: a longer prompt keeps its start token and its last tokens.
        truncation: what happens above max_length.
        reverse: the prompt is learned, given the answer.
        completion_only_loss, assistant_only_loss, last_turn_only: what is learned of a
            conversation, see config.algorithms.SFTConfig.
        padded: as in Aira's original scripts, everything is learned, and padding to max_length too.
        on_bad_row: error or skip.
    """

    task: Literal["conversation", "pair", "label"]
    max_length: int
    max_prompt_length: int | None = None
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    reverse: bool = False
    completion_only_loss: bool = True
    assistant_only_loss: bool = True
    last_turn_only: bool = False
    padded: bool = False
    on_bad_row: Literal["error", "skip"] = "error"


def recipe_of(task: str, data: DataConfig, max_length: int, sft: SFTConfig | None = None) -> Recipe:
    """The recipe that a configuration asks for.

    Raises:
        ConfigError: an option that the task does not have.
    """
    if task != "conversation":
        for name in ("compat", "reverse"):
            if getattr(data, name):
                raise ConfigError(f"data.{name}: is for SFT and for nothing else; leave it out")
    if task != "pair" and data.share_prompt == "always":
        raise ConfigError("data.share_prompt: only pairs have a prompt to share; leave it out")
    return Recipe(
        task,
        max_length,
        data.max_prompt_length,
        data.truncation,
        reverse=data.reverse,
        padded=data.compat == "aira",
        on_bad_row=data.on_bad_row,
        **(asdict(sft) if sft else {}),
    )


class Dropped(Exception):
    """A row that cannot be trained on, with the reason."""
