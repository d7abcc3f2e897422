"""Options of the data.

The text below an option is its `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt

from easyaira.config.ranges import Share
from easyaira.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """One data set."""

    path: str
    """Hub id, local file (.jsonl .jsonl.gz .json .csv .parquet .arrow) or folder."""
    split: str = "train"
    """Split of a hub data set; a local file has only one."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the column's name there, such as {prompt: question, completion: answer}."""
    weight: PositiveFloat = 1.0
    """How often an epoch shows its rows: 2 shows each twice, 0.5 half of them."""
    template: str | None = None
    """Of this source; default: data.template."""
    streaming: bool = False
    """Read a hub data set over the network, row by row, without storing it first."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    train: str | list[Source]
    """Hub id, file or folder, or a list of {path, split, columns, weight, template, streaming}."""
    split: str = "train"
    """Split of a hub data set that is named by a plain string."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the column's name there, for sources named by a plain string."""
    eval: OpenUnitInterval | str | list[Source] | None = None
    """Held-out rows: a share of train split off by prompt (0.02), or sources like train."""
    template: str = "chat"
    """plain (prompt, completion, EOS, nothing between), aira, tulu, zephyr, chatml, llama-2, chat
    (the tokenizer's own), a .jinja file, or a Jinja template itself."""
    reverse: bool = False
    """Learn the prompt, given the completion: a backward model, for instruction backtranslation."""
    allowed_tokens: list[str] = field(default_factory=list)
    """Control tokens that stand for themselves where a text spells them. All others stay text."""
    max_examples: PositiveInt | None = None
    """Read only so many rows of each source of train."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read: stop and say where, or count it and go on."""
    max_length: PositiveInt | None = None
    """Longest example in tokens; default: the model's number of positions."""
    max_prompt_length: PositiveInt | None = None
    """A longer prompt keeps its start token and its last tokens."""
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """What happens to an example above max_length: its end is cut (and then no EOS is learned), the
    start of its prompt is cut, or the row is dropped. Counted in data_report.json."""
    packing: bool = True
    """Put the examples of an update side by side in rows, each seeing only itself. It changes the
    amount of padding and nothing else."""
    share_prompt: Literal["auto", "always", "never"] = "auto"
    """Store the prompt of a pair once, seen by both answers. It changes the work and nothing else;
    auto does it where it saves enough, and says so."""
    drop_last: bool = False
    """Leave out an epoch's last, smaller update."""
    max_dropped: Share = 0.05
    """Stop if more than this share of the rows cannot be trained on."""
    compat: Literal["aira"] | None = None
    """aira: for study, the loss of Aira's original scripts, on prompts and on padding up to
    max_length (SFT only)."""
    cache_dir: str | None = None
    """Where tokenised data are kept; default: EASYAIRA_CACHE, or easyaira in the user's cache."""

    def __post_init__(self):
        if isinstance(self.eval, list) and any(source.weight != 1 for source in self.eval):
            raise ConfigError("data.eval: held-out rows are shown once each; leave out weight")
        named = isinstance(self.train, str) or isinstance(self.eval, str)
        if not named and (self.split != "train" or self.columns):
            raise ConfigError(
                "data.split and data.columns: speak of sources named by a plain string; in a list, "
                "each source has its own"
            )
