"""Reward and toxicity models: how often a score agrees with rows of answers or of texts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from easyaira.config.data import DataConfig, Source
from easyaira.config.model import ModelConfig
from easyaira.config.run import TrainReward
from easyaira.data import columns, examples, sources, tokenise
from easyaira.data.batches import Batches
from easyaira.data.chat_templates import as_argument
from easyaira.data.examples import Account, Examples
from easyaira.data.packing import attention_cost, shares_prompt
from easyaira.data.recipe import recipe_of
from easyaira.data.template import Template
from easyaira.distributed import mesh as meshes
from easyaira.errors import DataError, WeightsError
from easyaira.evaluation.results import digest
from easyaira.losses import preference
from easyaira.losses.scores import roc_auc
from easyaira.train import loader
from easyaira.train.resolve import Resolved, find

ROWS = 32  # examples at a time, per data shard
COMPARED = {"question", "answer_0", "answer_1", "score_0", "score_1"}  # openai/webgpt_comparisons
CUT = ("cut", "truncated")  # words of notes about examples that were shortened


class Judged(NamedTuple):
    """Scores of rows.

    Attributes:
        margins: [n] score of the better answer less that of the worse, for every two answers to a
            prompt that are not tied; of labelled texts, distance from 0 to the right side.
        rows: [n] row of each margin.
        scores, is_better: [rows, answers]; is_better: the best answers to a prompt, or the texts
            with the positive label.
        groups: [n] value of the column to group by.
        account: rows read, dropped and cut.
        ties: comparisons without a better answer, which are left out.
        content: hash of the rows.
    """

    margins: np.ndarray
    rows: np.ndarray
    scores: np.ndarray
    is_better: np.ndarray
    groups: list[str]
    account: Account
    ties: int
    content: str

    @property
    def truncated(self) -> int:
        noted = self.account.noted
        return sum(count for why, count in noted.items() if any(word in why for word in CUT))

    def metrics(self) -> dict[str, float]:
        """Share of comparisons or texts that are judged correctly (a margin of 0 is wrong); area
        under the ROC curve of labelled texts."""
        metrics = {"accuracy": float((self.margins > 0).mean())}
        auc = roc_auc(self.scores[self.is_better], self.scores[~self.is_better])
        if self.scores.shape[1] == 1 and auc is not None:
            metrics["auc"] = auc
        return metrics

    def stderr(self) -> float | None:
        """Standard error of the accuracy. Comparisons of one row are not independent: Liang and
        Zeger (1986), Longitudinal data analysis using generalized linear models, with G / (G - 1).
        """
        right = self.margins > 0
        _, at = np.unique(self.rows, return_inverse=True)
        off = np.bincount(at, weights=right - right.mean())
        count = len(off)
        if count < 2:
            return None
        return float(((off**2).sum() * count / (count - 1)) ** 0.5 / len(right))

    def by_group(self) -> dict[str, dict[str, float]]:
        """Comparisons (or texts) and accuracy of each group, largest group first."""
        names, groups = np.unique(self.groups, return_inverse=True)
        by_name = {
            str(name): {
                "examples": int((groups == g).sum()),
                "accuracy": float((self.margins[groups == g] > 0).mean()),
            }
            for g, name in enumerate(names)
        }
        return dict(sorted(by_name.items(), key=lambda item: -item[1]["examples"]))


def judge(
    name: str,
    source: Source,
    *,
    by: str | None = None,
    limit: int | None = None,
    template: str = "chat",
    positive_label: int = 0,
    dtype: str = "float32",
    mesh: str = "fsdp=-1",
) -> Judged:
    """Score the rows of a source.

    Args:
        name: a scorer: run folder, Hugging Face folder or hub id.
        source: pairs, several answers with scores or ranks, labelled texts, or comparisons as
            openai/webgpt_comparisons.
        by: column to group by.
        limit: read at most this many rows.
        template: as `data.template`; encoders have their own.
        positive_label: label that scores above 0.
        dtype, mesh: as for training.

    Raises:
        EasyAiraError: a model that is no scorer, rows that fit no form, or a missing column.
    """
    devices = meshes.make_mesh(mesh)
    data = DataConfig(train=[source], template=template)
    config = TrainReward(model=ModelConfig(name, dtype=dtype), data=data)
    with as_argument():
        resolved = find(config, devices, scorer=True)
    if not resolved.model.architecture.encoder:  # as it is, without a padding token for training
        own = Template(resolved.origin.tokenizer(), template, resolved.origin.config["model_type"])
        resolved = resolved._replace(model=resolved.stored, template=own)
    part, account, groups, ties, content = _read(source, data, resolved, by, limit)
    model = resolved.model
    examples.check_embedded(part.tokens, model.vocab_size)
    shared = not model.architecture.encoder and shares_prompt("auto", part, model.compute.attention)
    model = replace(model, compute=replace(model.compute, shared_prompt=part.answers * shared))
    shards = meshes.data_shards(devices)
    batches = Batches(
        part,
        ROWS * shards,
        shards=shards,
        share_prompt=shared,
        attention=attention_cost(model.config.width, model.config.heads, model.compute.attention),
    )

    @jax.jit
    def score(params: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        rows = {key: array[0] for key, array in rows.items()}  # the only micro-batch
        return model.score(params, rows, examples=ROWS * shards, answers=part.answers)[0]

    with model.on(devices):
        params = resolved.origin.load(model, devices)
        parts = [
            np.asarray(score(params, ready.arrays))[ready.batch.slots[:, 1]]
            for ready in loader.ahead(batches, 0, len(batches), devices, "of the evaluation")
        ]
    scores = np.concatenate(parts)
    if not np.isfinite(scores).all():
        raise WeightsError(f"{name}: scores are not finite; its weights hold NaN")
    if part.answers > 1:
        is_better = part.ranks == 0
        first, second = np.array(preference.pairs_of(part.answers)).T  # best answers come first
        ranks, others = part.ranks[:, first], part.ranks[:, second]
        of, pair = np.nonzero((ranks >= 0) & (ranks < others))
        margins = scores[of, first[pair]] - scores[of, second[pair]]
        ties += int(((ranks >= 0) & (ranks == others)).sum())
    else:
        is_better = (part.labels == positive_label)[:, None]
        margins, of = np.where(is_better, scores, -scores)[:, 0], np.arange(len(part))
    kept = [groups[row] for row in part.rows[of]]
    return Judged(margins, part.rows[of], scores, is_better, kept, account, ties, content)


def _read(
    source: Source, data: DataConfig, resolved: Resolved, by: str | None, limit: int | None
) -> tuple[Examples, Account, list[str], int, str]:
    """Tokenised rows, their counts, the group of each row that was read, the ties, and a hash of
    the rows."""
    located, groups, ties, texts = [], [], 0, []
    for place, row in sources.read(source):
        if len(located) == limit:
            break
        if isinstance(row, sources.BadRow):
            raise DataError(f"{place}: {row.reason}. Fix the row")
        if by is not None and by not in row:
            raise DataError(f"{place}: no column {by}, which --by names; found {', '.join(row)}")
        # an image's text would be its place in memory
        texts.append(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__))
        group = str(row[by]) if by else ""
        if row.keys() >= COMPARED:
            if row["score_0"] == row["score_1"]:
                ties += 1
                continue
            row = _compared(row)
        # so that the group's column is not reported as unused
        row = {key: value for key, value in row.items() if key != by}
        located.append(sources.Located(place, row))
        groups.append(group)
    if not located:
        raise DataError(f"{source.path}: every comparison is a tie; there is nothing to judge")
    task = _task(located[0])
    recipe = recipe_of(task, data, resolved.max_length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tokenise.build(iter(located), path, recipe=recipe, template=resolved.template, label="rows")
        part, account = examples.open_folder(path)
        part = replace(part, tokens=np.array(part.tokens), learned=np.array(part.learned))
    pad = resolved.origin.config.get("pad_token_id")
    if pad is not None and not resolved.model.architecture.encoder:
        part = _without_padding(part, pad)
    account.check(1.0)
    return part, account, groups, ties, digest(*texts)


def _without_padding(part: Examples, pad: int) -> Examples:
    """Cut padding tokens off the end of answers, since transformers scores a decoder at the last
    token that is not padding; the end token may be the padding token."""
    kept = np.ones(len(part.tokens), bool)
    for bounds in part.bounds.tolist():
        for start, end in pairwise(bounds[1:]):
            while end > start + 1 and part.tokens[end - 1] == pad:
                end -= 1
                kept[end] = False
    place = np.concatenate([[0], np.cumsum(kept)])
    left = {"tokens": part.tokens[kept], "learned": part.learned[kept]}
    return replace(part, bounds=place[part.bounds], **left)


def _compared(row: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison of two answers as a pair."""
    question = row["question"]
    prompt = question["full_text"] if isinstance(question, Mapping) else question
    better = int(row["score_1"] > row["score_0"])
    chosen, rejected = row[f"answer_{better}"], row[f"answer_{1 - better}"]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _task(located: sources.Located) -> str:
    """The kind of a row: pair or label."""
    names = list(located.row)
    fits = [
        task for task in ("pair", "label") if any(form.fits(names) for form in columns.FORMS[task])
    ]
    if len(fits) != 1:
        listed = f"{located.place}: found columns {', '.join(names)}, which are"
        if fits:
            raise DataError(f"{listed} both a pair and a labelled text; rename them")
        wanted = columns.usual(("pair", "label"))
        raise DataError(f"{listed} neither a pair nor a labelled text; wanted {wanted}")
    return fits[0]
