"""Rows to examples: tokenise, truncate, and count every row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from easyaira.data import columns
from easyaira.data.examples import (
    OF_ROWS,
    REPEATED,
    Account,
    Files,
    Parts,
    digest,
    identity,
)
from easyaira.data.recipe import Dropped, Recipe
from easyaira.data.shown import KEPT, show
from easyaira.data.sources import BadRow, Located
from easyaira.data.template import Template
from easyaira.data.texts import Texts, texts_of
from easyaira.data.truncate import CUT, Origin, Windows, fit, lengths_of, pad_parts
from easyaira.errors import DataError, TokenizerError

CHUNK = 1000  # rows to tokenise together, on all cores
CHUNK_CHARACTERS = 2**21  # of such rows, at most; a character takes 200 bytes
LONGEST_TEXT = 2**21  # characters
# What to do with a column that would change what is learned, {} being its name; and for some tasks
FIX = "set data.columns {{unused: {}}}"
FIXES = {"prompt": "rename it for reward functions: data.columns {{gold: {}}}"}


def build(
    rows: Iterable[Located],
    folder: Path,
    *,
    recipe: Recipe,
    template: Template,
    label: str,
    known: Mapping[int, str] | None = None,
) -> Account:
    """Tokenise rows into files in `folder`, and count kept and dropped rows.

    Args:
        known: ids of earlier examples, and the reason to drop a row that repeats one; for
            recipe.deduplicate.

    Raises:
        DataError: a row is unreadable, unless recipe.on_bad_row is skip.
    """
    account, seen, windows = Account(), dict(known or {}), Windows(recipe)
    rows = tqdm(rows, desc=f"tokenising {label}", unit="row", disable=None)
    with Files(folder) as files:

        def store(parts: Parts, of: Origin, notes: list[str], **numbers: float) -> None:
            """Write an example and show it; add to the notes of its row.

            Raises:
                Dropped: see `fit`, or it repeats an earlier one.
            """
            fitted, cuts = fit(parts, template, recipe)
            unseen = recipe.max_length - sum(lengths_of(fitted)) if recipe.padded else 0
            stored = pad_parts(fitted, unseen, template.tokenizer.pad_token_id)
            example = identity(stored, **numbers)
            if recipe.deduplicate:
                if example in seen:
                    raise Dropped(seen[example])
                seen[example] = REPEATED
            if any(note.startswith(CUT) for note in cuts):
                account.cut[sum(lengths_of(parts))] += 1
            notes[:0] = cuts
            show(account, of.place, fitted, template, "; ".join([KEPT, *notes]))
            places = {"rows": of.row, "sources": 0, "ids": example, "prompt_ids": of.prompt_id}
            files.add(stored, **places, unseen=unseen, **numbers)

        for row, place, texts, parts in _tokenised(rows, account, recipe, template):
            numbers = {"labels": texts.label, "margins": texts.margin, "weights": texts.weight}
            judged = [tokens for tokens, _ in parts.answers] if texts.judged else []
            prompt_id = digest(parts.prompt, *judged)  # these texts have no prompt
            notes = [*texts.notes]
            if any(template.types_control(text) for text in texts.spelled):
                notes[:0] = ["a text spells a control token, which stays text"]
            examples = windows.add(parts, Origin(row, place, prompt_id))
            if recipe.texts == "split" and len(examples) > 1:
                notes.append(f"split into examples of {recipe.max_length} tokens")
            try:
                for example, of in examples:
                    store(example, of, notes, **numbers)
            except Dropped as reason:
                account.drop(str(reason), place)
                show(account, place, parts, template, str(reason))
                continue
            account.noted.update(notes)
            account.unread.update(texts.unread)
            account.kept += 1
        for example, of in windows.rest():
            store(example, of, [], **dict.fromkeys(OF_ROWS, math.nan))
        if account.kept and not files:
            raise DataError(f"{label}: all texts together are shorter than an example may be")
    (folder / "account.json").write_text(json.dumps(vars(account)), encoding="utf-8")
    return account


def _readable(
    rows: Iterable[Located], account: Account, recipe: Recipe, template: Template
) -> Iterator[tuple[int, str, Texts]]:
    """Yield readable rows with index and place; count the others, or raise DataError."""
    form = None
    for place, row in rows:
        account.read += 1
        try:
            if isinstance(row, BadRow):
                raise columns.Unreadable(row.reason)
            if recipe.task != "prompt":
                form = form or _form(row, recipe, place)
            record = columns.Record(row)
            texts = texts_of(record, form, recipe, template)
            if (longest := max(map(len, texts.spelled), default=0)) > LONGEST_TEXT:
                raise columns.Unreadable(
                    f"a text of {longest:,} characters, more than {LONGEST_TEXT:,}; split it"
                )
            unread = tuple(dict.fromkeys(record.unread(FIXES.get(recipe.task, FIX))))
            texts = texts._replace(unread=unread, notes=tuple(dict.fromkeys(record.notes)))
            yield account.read - 1, place, texts
        except columns.Unreadable as error:
            if recipe.on_bad_row == "error":
                raise DataError(
                    f"{place}: {error}. Fix the row, or set data.on_bad_row to skip"
                ) from error
            account.drop("unreadable", place)
        except Dropped as reason:
            account.drop(str(reason), place)
        except TokenizerError as error:
            raise TokenizerError(f"{place}: {error}") from error


def _tokenised(
    rows: Iterable[Located], account: Account, recipe: Recipe, template: Template
) -> Iterator[tuple[int, str, Texts, Parts]]:
    """Yield readable rows with their tokens, tokenised in chunks so that all cores are used."""
    readable = _readable(rows, account, recipe, template)
    for chunk in _chunks(readable):
        for read, parts in zip(chunk, _located_parts(chunk, recipe, template), strict=True):
            yield *read, parts


def _chunks(readable: Iterable[tuple[int, str, Texts]]) -> Iterator[list[tuple[int, str, Texts]]]:
    """Group rows by CHUNK, or fewer where they are long."""
    chunk, characters = [], 0
    for row in readable:
        chunk.append(row)
        characters += sum(map(len, row[2].spelled))
        if len(chunk) == CHUNK or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _form(row: Any, recipe: Recipe, place: str) -> columns.Form:
    try:
        form = columns.form_of(list(row), recipe.task)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if recipe.texts != "whole" and form.columns != ("text",):
        raise DataError(
            f"{place}: has columns {', '.join(form.columns)}, and data.texts: {recipe.texts} is "
            "for rows with a text; leave it out, or name the column in data.columns: {text: NAME}"
        )
    return form


def _located_parts(
    readable: Sequence[tuple[int, str, Texts]], recipe: Recipe, template: Template
) -> list[Parts]:
    """Tokenise rows; an error of the tokenizer names its row."""
    try:
        return list(_parts(readable, recipe, template))
    except TokenizerError as error:
        if len(readable) == 1:
            raise TokenizerError(f"{readable[0][1]}: {error}") from error
        return [parts for row in readable for parts in _located_parts([row], recipe, template)]


def _parts(
    readable: Sequence[tuple[int, str, Texts]], recipe: Recipe, template: Template
) -> Iterator[Parts]:
    if recipe.task == "label":
        encoded = iter(template.judged([text for *_, texts in readable for text in texts.judged]))
        empty = np.zeros(0, np.int32)
        for *_, texts in readable:
            sides = [next(encoded) for _ in texts.judged]
            answers = [(tokens, np.zeros(len(tokens), bool)) for tokens in sides]
            yield Parts(empty, empty.astype(bool), answers)
        return
    conversations = [messages for *_, texts in readable for messages in texts.conversations]
    if recipe.task == "prompt":
        nothing = np.zeros(0, np.int32), np.zeros(0, bool)
        for messages in conversations:
            tokens = template.prompt(messages)
            yield Parts(tokens, np.zeros(len(tokens), bool), [nothing])
        return
    whole = [text for *_, texts in readable for text in texts.judged]
    encoded = iter(template.whole(whole) or template.encode(conversations))
    for *_, texts in readable:
        sides = [_split(next(encoded), texts, recipe) for _ in texts.judged or texts.conversations]
        yield Parts(*sides[0][:2], [answer for *_, answer in sides], ranks=texts.ranks)


Answer = tuple[np.ndarray, np.ndarray]  # tokens, learned


def _split(
    spans: list[tuple[np.ndarray, bool]], texts: Texts, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray, Answer]:
    """Split a conversation into prompt and answer at the start of the first learned answer."""
    if texts.context:
        spans = _without(spans, texts.context)
    answers = [i for i, (_, is_answer) in enumerate(spans) if is_answer]
    first = answers[-1] if texts.last_only else answers[0]
    prompt = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in spans[:first])])
    everything = recipe.padded
    prompt_learned = np.full(len(prompt), everything or not recipe.completion_only_loss)
    answer = [
        (tokens, np.full(len(tokens), is_answer or everything or not recipe.assistant_only_loss))
        for tokens, is_answer in spans[first:]
    ]
    tokens, learned = (np.concatenate(arrays) for arrays in zip(*answer, strict=True))
    return prompt, prompt_learned, (tokens, learned)


def _without(
    spans: list[tuple[np.ndarray, bool]], ranges: Sequence[tuple[int, int]]
) -> list[tuple[np.ndarray, bool]]:
    """The spans with nothing learned in `ranges`."""
    tokens = np.concatenate([tokens for tokens, _ in spans])
    learned = np.concatenate([np.full(len(tokens), flag) for tokens, flag in spans])
    for start, end in ranges:
        learned[start:end] = False
    edges = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1), len(tokens)]
    return [(tokens[a:b], bool(learned[a])) for a, b in pairwise(edges)]
