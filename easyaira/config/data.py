"""Options of the data.

The string below an option is its `--help`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import OpenUnitInterval

from easyaira.config.ranges import Count, CountOrZero, Share, Weight
from easyaira.errors import ConfigError, shortened


@dataclass(frozen=True)
class Source:
    """One data set."""

    path: str
    """Hub id, local file (.jsonl, .jsonl.gz, .json, .csv, .parquet, .arrow), folder, or pattern of
    files (data/*.jsonl)."""
    split: str = "train"
    """Split of a hub data set, or of a folder with files such as train and test; a file has only
    one."""
    columns: dict[str, str] = field(default_factory=dict)
    """EasyAira's column name -> the data set's, such as {prompt: question, completion: answer}."""
    weight: Weight = 1.0
    """Repeats of each row in an epoch: 2 uses every row twice, 0.5 a random half of them."""
    template: str | None = None
    """Chat template of this source; default: data.template."""
    streaming: bool = False
    """Read a hub data set row by row over the network, without downloading it first."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out data."""

    train: str | list[Source]
    """Hub id, file or folder, or a list of {path, subset, split, columns, weight, template,
    streaming}."""
    split: str = "train"
    """Split of a hub data set that is named by a plain string."""
    columns: dict[str, str] = field(default_factory=dict)
    """EasyAira's column name -> the data set's, for sources named by a plain string."""
    eval: OpenUnitInterval | CountOrZero | str | list[Source] | None = None
    """Held-out rows: a share of train, split by prompt (0.02), a number of its prompts (200), or
    sources like train; 0: none."""
    template: str = "chat"
    """Chat template: plain (prompt, completion, EOS, nothing between), aira, tulu, zephyr, chatml,
    llama-2, chat (the tokenizer's own), a .jinja file, or a Jinja template as text."""
    reverse: bool = False
    """Swap prompt and completion: train a backward model, for instruction backtranslation."""
    allowed_tokens: list[str] = field(default_factory=list)
    """Control tokens to recognise in the text of a row; all others stay plain text."""
    max_examples: Count | None = None
    """Read at most N rows of each source of train."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Unreadable row: stop with its place, or skip and count it."""
    max_length: Count | None = None
    """Longest example in tokens; default: the model's number of positions."""
    min_length: Count | None = None
    """Shortest example in tokens, prompt and answer together; a row with a shorter one, or with a
    shorter side of a pair, is dropped and counted."""
    max_prompt_length: Count | None = None
    """Longest prompt in tokens; a longer one keeps its start token and its last tokens."""
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """For an example above max_length: cut its end (so it has no EOS to learn), cut the start of
    its prompt, or drop the row. data_report.json counts these examples."""
    texts: Literal["whole", "split", "join"] = "whole"
    """Rows of plain text (SFT). whole: an example each; split: several, for a row above max_length;
    join: all texts of a source, joined and cut at max_length (continued pretraining)."""
    packing: bool = True
    """Pack several examples of an update into one row; an example attends only to itself. Packing
    changes the amount of padding and nothing else."""
    share_prompt: Literal["auto", "always", "never"] = "auto"
    """Store the prompt of several answers once; all of them attend to it. Sharing changes the
    amount of computation and nothing else. auto: share where it saves enough; the log says so."""
    shuffle: bool = True
    """Visit the rows in a new random order in every epoch; false: in the order of the data, such as
    a curriculum."""
    drop_last: bool = False
    """Drop an epoch's last update if it is smaller than the others."""
    deduplicate: bool = False
    """Drop and count rows that repeat an earlier one exactly, in its source or another, and
    held-out rows that are also trained on. Copies made by a weight are not repeats."""
    max_dropped: Share = 0.05
    """Stop if more than this share of the rows was dropped, not counting those of deduplicate."""
    compat: Literal["aira"] | None = None
    """aira: reproduce the loss of Aira's original scripts, which includes prompts and padding up
    to max_length (SFT only)."""
    cache_dir: str | None = None
    """Cache of tokenised data; default: EASYAIRA_CACHE, or easyaira in the user's cache folder."""

    def __post_init__(self):
        for name, value in (("data.train", self.train), ("data.eval", self.eval)):
            share = "" if name == "data.train" else "a share below 1, a number of prompts, "
            wrong = r"\s*(\[\s*[{\"']|\{\s*[\"\w]+\s*:)" + (
                r"|[-+.\d]*\d$|[-+]?(nan|inf)$|true$|false$" if share else ""
            )
            if isinstance(value, str) and re.match(wrong, value):
                raise ConfigError(
                    f"{name}: expected {share}a path or a list such as [{{path: FILE}}] with valid "
                    f"options, got {shortened(value)}"
                )
        for name, value in (("data.train", self.train), ("data.eval", self.eval)):
            if value == [] or isinstance(value, str) and not value.strip():
                raise ConfigError(f"{name}: names no data; give a path or a list with sources")
        if isinstance(self.eval, list) and any(source.weight != 1 for source in self.eval):
            raise ConfigError("data.eval: held-out rows are evaluated once each; leave out weight")
        named = isinstance(self.train, str) or isinstance(self.eval, str)
        if not named and (self.split != "train" or self.columns):
            raise ConfigError(
                "data.split and data.columns: apply to sources named by a plain string; in a list, "
                "set them in each source"
            )
