"""The recipe: the options that determine how a row is tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from easyaira.config.algorithms import SFTConfig
from easyaira.config.data import DataConfig
from easyaira.errors import ConfigError

LOSS_MASK = ("completion_only_loss", "assistant_only_loss", "last_turn_only")


@dataclass(frozen=True)
class Recipe:
    """How to tokenise a row. Recipe, template and tokenizer together determine every token.

    Attributes:
        task: kind of row: a conversation to train on, two or more answers to compare, an answer
            with a label, a text to score, or a prompt to answer.
        max_length: longest prompt with answer, in tokens; in the task prompt, longest prompt.
        min_length: a row is dropped if its prompt with answer is shorter.
        max_prompt_length: a longer prompt keeps its start token and its last tokens.
        truncation: treatment of examples above max_length.
        texts: treatment of texts that are learned whole, see config.data.DataConfig.
        reverse: swap prompt and answer.
        completion_only_loss, assistant_only_loss, last_turn_only: loss mask of a conversation, see
            config.algorithms.SFTConfig.
        padded: put loss on every token and on padding to max_length, as Aira's original scripts do.
        on_bad_row: error or skip.
        margin: whether a pair's column margin is read.
        deduplicate: a row is dropped if its tokens, the tokens with loss, and its label, margin,
            weight and ranks are those of an earlier row.
        compared: which of the answers to a prompt are kept, see config.dpo.DPOConfig.answers.
    """

    task: Literal["conversation", "pair", "rated", "label", "prompt"]
    max_length: int
    min_length: int | None = None
    max_prompt_length: int | None = None
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    texts: Literal["whole", "split", "join"] = "whole"
    reverse: bool = False
    completion_only_loss: bool = True
    assistant_only_loss: bool = True
    last_turn_only: bool = False
    padded: bool = False
    on_bad_row: Literal["error", "skip"] = "error"
    margin: bool = True
    deduplicate: bool = False
    compared: Literal["all", "best_rest", "best_worst"] = "all"


def recipe_of(
    task: str,
    data: DataConfig,
    max_length: int,
    sft: SFTConfig | None = None,
    *,
    margin: bool = True,
    compared: str = "all",
) -> Recipe:
    """The recipe of a configuration.

    Raises:
        ConfigError: an option does not apply to the task.
    """
    if task != "conversation":
        for name in ("compat", "reverse"):
            if getattr(data, name):
                raise ConfigError(f"data.{name}: is for SFT only; leave it out")
    if data.texts != "whole":
        if task != "conversation":
            raise ConfigError(f"data.texts: {data.texts} is for SFT only; leave it out")
        for name in ("compat", "reverse", "deduplicate"):
            if getattr(data, name):
                raise ConfigError(
                    f"data.texts: {data.texts} makes examples of parts of texts, which data.{name} "
                    "does not support; leave one of them out"
                )
    if task not in ("pair", "rated", "prompt") and data.share_prompt == "always":
        raise ConfigError("data.share_prompt: only pairs have a prompt to share; leave it out")
    return Recipe(
        task,
        max_length,
        data.min_length,
        data.max_prompt_length,
        data.truncation,
        data.texts,
        reverse=data.reverse,
        padded=data.compat == "aira",
        on_bad_row=data.on_bad_row,
        deduplicate=data.deduplicate,
        margin=margin,
        compared=compared,
        **{name: getattr(sft, name) for name in LOSS_MASK if sft},
    )


class Dropped(Exception):
    """A row was dropped; the message is the reason."""
