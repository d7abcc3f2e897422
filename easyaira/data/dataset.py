"""The data of a run: read sources, apply their weights, split by prompt."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from easyaira.config.data import DataConfig, Source
from easyaira.data import pairs, sources
from easyaira.data.cache import Earlier, cached_source
from easyaira.data.columns import TRAINED_BY, Message, Record, fitting, hint, question, usual
from easyaira.data.examples import (
    PER_EXAMPLE,
    PER_TOKEN,
    TRAINED,
    Account,
    Examples,
    check_embedded,
)
from easyaira.data.recipe import Recipe
from easyaira.data.template import Template
from easyaira.errors import ConfigError, DataError, TokenizerError, escaped, folded, shortened

SHOWN = 20  # unused columns to name in the log
CUT_SHARE = 0.05  # warn above this share of rows that are cut
RESIZE = ", or set model.resize"
OVERLAP = 0.01  # warn above this share of held-out examples whose prompt is also trained on


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        train, held_out: examples for training and for evaluation.
        report: content of data_report.json: kept and dropped rows, and statistics.
        accounts: part ("train", "held out") -> counts of rows, and some rows to show.
    """

    train: Examples
    held_out: Examples | None
    report: dict[str, Any]
    accounts: dict[str, Account]


def load(
    config: DataConfig,
    recipe: Recipe,
    *,
    template: Template,
    vocab_size: int,
    seed: int,
    positions: int | None = None,
) -> Data:
    """Read, tokenise, count and split all sources of `config`.

    Args:
        positions: the model's number of positions, for a warning.

    Raises:
        DataError: no row is usable or has a weight above 0, or the dropped share exceeds
            config.max_dropped.
        TokenizerError: a token id has no embedding, or data.compat needs a missing pad_token.
    """
    if recipe.padded and template.tokenizer.pad_token_id is None:
        raise TokenizerError(
            "tokenizer: data.compat needs a pad_token; set one in its tokenizer_config.json"
        )
    earlier: list[Earlier] = []
    read = partial(_read, config, recipe, template, positions, earlier)
    train, account = read(config.train, "train", config.max_examples)
    check_embedded(train.tokens, vocab_size, RESIZE)
    accounts = {"train": account}
    held_out = None
    if isinstance(config.eval, int | float) and config.eval:
        train, held_out = hold_out(train, config.eval, seed)
    elif config.eval:
        earlier[:] = [of._replace(reason=TRAINED) for of in earlier]
        held_out, accounts["held out"] = read(config.eval, "held-out")
        check_embedded(held_out.tokens, vocab_size, RESIZE)
    if not train.weights.any():  # NaN, a row without a weight, counts
        raise DataError("data.train: the weight of every row is 0, so nothing would be learned")
    once = train  # each row once, whatever its weight
    if not isinstance(config.train, str):
        train = weighted(train, [source.weight for source in config.train], seed)
    if held_out is not None and train.answers > 1 < held_out.answers:
        most = max(train.answers, held_out.answers)
        train, held_out = train.widened(most), held_out.widened(most)
    report = {name: _account_report(account) for name, account in accounts.items()}
    report["train"] |= _statistics(train) | {"duplicates": _duplicates(once)}
    if len(sources := sources_of(config, config.train)) > 1:
        counts = np.bincount(train.sources, minlength=len(sources)).tolist()
        report["train"]["examples by source"] = {
            f"{number + 1} {source.path}": count
            for number, (source, count) in enumerate(zip(sources, counts, strict=True))
        }
    if held_out is not None:
        report.setdefault("held out", {})
        report["held out"] |= _statistics(held_out) | _overlap(train, held_out)
    if recipe.task == "pair" and train.answers == 2:
        report["train"]["answers"] = pairs.statistics(train)
    prints = [part.fingerprint() for part in (train, held_out) if part is not None]
    report |= {
        "fingerprint": "-".join(prints),
        "template": template.name,
        "own template": template.own(),
        "recipe": asdict(recipe),
    }
    return Data(train, held_out, report, accounts)


def task_of(config: DataConfig, tasks: Sequence[str], ask: str = "") -> str:
    """The task of `tasks` that the columns of the first row match.

    Raises:
        DataError: the columns match no task, or several.
    """
    first = next(iter(sources_of(config, config.train)))
    bad: list[str] = []
    columns: list[str] = []
    for place, row in sources.read(first):
        if not isinstance(row, sources.BadRow):
            columns = list(row)
            break
        bad.append(f"{place}: {row.reason}")
        if config.on_bad_row == "error":
            break
    if not columns and bad:
        raise DataError(f"{bad[0]}. Fix the row, or set data.on_bad_row to skip")
    fits = list(dict.fromkeys(task for task, _ in fitting(columns, tasks)))
    if len(fits) == 1:
        return fits[0]
    listed = f"{first.path}: found columns {', '.join(columns)}"
    if fits:
        commands = " and of ".join(f"`easyaira {TRAINED_BY[task]}`" for task in fits)
        raise DataError(f"{listed}, which are those of {commands}; {ask}rename the unwanted ones")
    raise DataError(f"{listed}; wanted columns such as {usual(tasks)}. {hint(columns)}")


def sources_of(config: DataConfig, what: str | Sequence[Source]) -> Sequence[Source]:
    """`config.train` or `config.eval` as a list."""
    return [Source(what, config.split, config.columns)] if isinstance(what, str) else what


class Question(NamedTuple):
    """A prompt as a reward gets it.

    Attributes:
        columns: other columns of its row, for reward functions; None where the row has no value.
    """

    messages: list[Message]
    columns: Mapping[str, Any]


def questions_of(
    config: DataConfig,
    examples: Examples,
    what: str | Sequence[Source],
    takes: Callable[[str], bool] = lambda column: False,
) -> list[Question]:
    """Prompts of the sources `what`, read again: examples hold only tokens.

    Args:
        takes: whether a column is kept; all questions get the same ones.
    """
    wanted = list(zip(examples.sources.tolist(), examples.rows.tolist(), strict=True))
    needed, questions, takes = set(wanted), {}, cache(takes)
    for number, source in enumerate(sources_of(config, what)):
        last = max((row for of, row in needed if of == number), default=None)
        for row, located in enumerate(sources.read(source) if last is not None else ()):
            if (number, row) in needed:
                record = Record(located.row)
                columns = {name: record[name] for name in record if takes(name)}
                questions[number, row] = Question(question(record), columns)
                if row == last:
                    break  # a stream may have no end
    names = dict.fromkeys(name for asked in questions.values() for name in asked.columns)
    return [
        asked._replace(columns={name: asked.columns.get(name) for name in names})
        for asked in map(questions.__getitem__, wanted)
    ]


def columns_of(config: DataConfig, what: str | Sequence[Source]) -> list[str]:
    """Columns of the first readable row of each source."""
    names: dict[str, None] = {}
    for source in sources_of(config, what):
        rows = (row for _, row in sources.read(source) if not isinstance(row, sources.BadRow))
        names |= dict.fromkeys(next(rows, {}))
    return list(names)


def _read(
    config: DataConfig,
    recipe: Recipe,
    template: Template,
    positions: int | None,
    earlier: list[Earlier],
    what: str | Sequence[Source],
    label: str,
    limit: int | None = None,
) -> tuple[Examples, Account]:
    parts, account = [], Account()
    for number, source in enumerate(sources_of(config, what)):
        own = template
        if source.template:
            if template.encoder:
                raise ConfigError("data.train: template: an encoder uses its own; leave it out")
            own = Template(
                template.tokenizer, source.template, template.model_type, config.allowed_tokens
            )
        part, source_account = cached_source(source, config, recipe, own, label, limit, earlier)
        parts.append(replace(part, sources=np.full(len(part), number, np.int16)))
        account += source_account
    account.check(config.max_dropped)
    _warn_of_cuts(account, config.truncation, recipe.max_length, positions, label)
    if account.unread:
        first = itertools.islice(account.unread.items(), SHOWN)
        shown = [f"{shortened(name)} ({count:,} rows)" for name, count in first]
        if left := len(account.unread) - len(shown):
            shown.append(f"and {left} more, in data_report.json")
        unused = escaped(", ".join(shown))
        use = "read by reward functions only" if recipe.task == "prompt" else "filled and not used"
        print(folded(f"data    {label}: {use}: {unused}"), flush=True)
    return _joined(parts), account


def _warn_of_cuts(
    account: Account, truncation: str, max_length: int, positions: int | None, label: str
) -> None:
    """Warn if more than CUT_SHARE of the rows are cut, with the lengths that would keep them."""
    cut = account.cut.total()
    if cut <= CUT_SHARE * account.kept:
        return
    loss = " and teach no end token" if truncation == "keep_start" else ""
    warning = (
        f"warning: {label}: {cut:,} of {account.kept:,} rows ({cut / account.kept:.0%}) are cut "
        f"at data.max_length {max_length:,}{loss}; {account.length_for(0.95):,} would keep 95 % "
        f"whole, {max(account.cut):,} all"
    )
    if positions and max(account.cut) > positions:
        warning += f"; the model has {positions:,} positions"
    print(folded(warning), flush=True)


def _joined(parts: list[Examples]) -> Examples:
    """Concatenate sources in memory. The tokens of a single source stay memory-mapped."""
    if len(parts) == 1:
        return parts[0]
    counts = {part.answers for part in parts if len(part)}  # all rows of a source may be repeats
    if len(counts) > 1 and 1 in counts:
        raise DataError("data: some sources have pairs and some single texts; use only one kind")
    parts = [part.widened(max(counts)) for part in parts]
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    moved = [
        replace(part, bounds=part.bounds + start)
        for part, start in zip(parts, starts[:-1], strict=True)
    ]
    return Examples(
        **{
            name: np.concatenate([getattr(part, name) for part in moved])
            for name in (*PER_EXAMPLE, *PER_TOKEN)
        }
    )


def hold_out(examples: Examples, part: float, seed: int) -> tuple[Examples, Examples]:
    """Split by prompt into (train, held out); no prompt is in both parts.

    Args:
        part: share of the prompts to hold out, or their number if it is an integer.

    Raises:
        DataError: there are too few prompts, so one part would be empty.
    """
    prompts = np.unique(examples.prompt_ids)
    count = part if isinstance(part, int) else math.ceil(part * len(prompts))
    if not 0 < count < len(prompts):
        raise DataError(
            f"data.eval: {part} of {len(prompts)} prompts leaves one part empty; choose "
            "another number"
        )
    chosen = np.random.default_rng([seed, 1]).permutation(prompts)[:count]
    held_out = np.isin(examples.prompt_ids, chosen)
    return examples.take(np.flatnonzero(~held_out)), examples.take(np.flatnonzero(held_out))


def weighted(examples: Examples, weights: Sequence[float], seed: int) -> Examples:
    """Repeat the rows of source s weights[s] times; the fraction selects a random share of them.

    Raises:
        ConfigError: a weight leaves no row of its source.
    """
    if all(weight == 1 for weight in weights):
        return examples
    index = []
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(examples.sources == source)
        rest = np.random.default_rng([seed, 2, source]).permutation(rows)
        chosen = [rows] * int(weight) + [np.sort(rest[: round((weight % 1) * len(rows))])]
        index.append(np.concatenate(chosen))
        if len(rows) and not len(index[-1]):
            raise ConfigError(f"data.train: weight {weight} leaves no row of source {source + 1}")
    return examples.take(np.concatenate(index))


def _account_report(account: Account) -> dict[str, Any]:
    return {
        "read": account.read,
        "kept": account.kept,
        "dropped": dict(account.dropped),
        "first_dropped": account.first_dropped,
        "noted": dict(account.noted),
        "not used": dict(account.unread),
    }


def _statistics(part: Examples) -> dict[str, Any]:
    """Statistics of examples; `length` is that of a prompt with one answer."""
    lengths = part.lengths()[part.exists]
    prompts = part.bounds[:, 1] - part.bounds[:, 0]
    counts = Counter(part.exists.sum(1).tolist()) if part.answers > 2 else {}
    return {
        "examples": len(part),
        **({"examples by answers": {str(n): counts[n] for n in sorted(counts)}} if counts else {}),
        "duplicates": _duplicates(part),
        "prompts": len(np.unique(part.prompt_ids)),
        "tokens": int(lengths.sum()),
        "learned_tokens": int(part.learned_counts.sum()),
        "length": _quantiles(lengths),
        "prompt_length": _quantiles(prompts),
    }


def _duplicates(part: Examples) -> int:
    return len(part) - len(np.unique(part.ids))


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    shares = {"shortest": 0, "median": 50, "95 %": 95, "longest": 100}
    return {name: int(np.percentile(lengths, share)) for name, share in shares.items()}


def _overlap(train: Examples, held_out: Examples) -> dict[str, int]:
    """Count held-out examples whose prompt is also trained on; warn above OVERLAP."""
    overlap = int(np.isin(held_out.prompt_ids, train.prompt_ids).sum())
    if overlap > OVERLAP * len(held_out):
        print(
            f"warning: {overlap} of {len(held_out)} held-out examples have a prompt that is also "
            "trained on, so the score partly measures memorisation",
            flush=True,
        )
    return {"prompts also trained on": overlap}
