"""Truncation and padding of examples, and division of texts into several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np

from easyaira.data.examples import Parts
from easyaira.data.recipe import Dropped, Recipe
from easyaira.data.template import Template

CUT = "cut to max_length"  # how the note of a cut begins


class Origin(NamedTuple):
    """The row in which an example begins, its place for messages, and the hash of its prompt."""

    row: int
    place: str
    prompt_id: int


class Windows:
    """Divides the texts of a source into examples, as `Recipe.texts` says; see data.texts.

    A window has recipe.max_length tokens, and no loss on the first, which nothing in it precedes.
    The last window of a text that is split, or of all texts that are joined, is shorter.
    """

    def __init__(self, recipe: Recipe):
        self._texts, self._length = recipe.texts, recipe.max_length
        self._shortest = max(2, recipe.min_length or 0)  # the first token has no loss
        self._rest: tuple[np.ndarray, np.ndarray] = np.zeros(0, np.int32), np.zeros(0, bool)
        self._origin: Origin | None = None  # of the rest

    def add(self, parts: Parts, origin: Origin) -> list[tuple[Parts, Origin]]:
        """Examples that one more row completes, each with the row in which it begins."""
        if self._texts == "whole":
            return [(parts, origin)]
        spans = [self._rest, (parts.prompt, parts.prompt_learned), *parts.answers]
        tokens, learned = (np.concatenate(arrays) for arrays in zip(*spans, strict=True))
        starts = range(0, len(tokens), self._length)
        windows = [tuple(a[i : i + self._length] for a in (tokens, learned)) for i in starts]
        parts_of = (origin._replace(place=f"{origin.place}, part {n}") for n in count(2))
        begun = chain([self._origin] if self._origin else [], [origin], parts_of)
        origins = list(islice(begun, len(windows)))
        if self._texts == "join":
            self._rest, self._origin = windows.pop(), origins[-1]
        elif len(windows) > 1 and len(windows[-1][0]) < self._shortest:
            windows.pop()
        return [(_answer(*one), of) for one, of in zip(windows, origins, strict=False)]

    def rest(self) -> Iterator[tuple[Parts, Origin]]:
        """The last example of joined texts, if it is long enough to be learned."""
        if self._origin and len(self._rest[0]) >= self._shortest:
            yield _answer(*self._rest), self._origin


def _answer(tokens: np.ndarray, learned: np.ndarray) -> Parts:
    return Parts(tokens[:0], learned[:0], [(tokens, learned)])


def pad_parts(parts: Parts, count: int, pad: int) -> Parts:
    """Append `count` padding tokens with loss to the answer."""
    if not count:
        return parts
    (tokens, learned) = parts.answers[0]
    padding, padding_learned = np.full(count, pad, np.int32), np.ones(count, bool)
    return parts._replace(
        answers=[(np.concatenate([tokens, padding]), np.concatenate([learned, padding_learned]))]
    )


def lengths_of(parts: Parts) -> tuple[int, int]:
    """Number of tokens of the prompt, and of the longest answer."""
    return len(parts.prompt), max(len(tokens) for tokens, _ in parts.answers)


def fit(parts: Parts, template: Template, recipe: Recipe) -> tuple[Parts, list[str]]:
    """Truncate prompt and answers to the lengths of the recipe; return them with notes of each cut.
    All answers are cut by the same rule.

    Raises:
        Dropped: the example is too short or does not fit, no token with loss is left, or the
            answers are identical.
    """
    prompt, prompt_learned, answers, _, ranks = parts
    shortest = len(prompt) + min(len(tokens) for tokens, _ in answers)
    if recipe.min_length and shortest < recipe.min_length:
        raise Dropped("shorter than min_length")
    start = int(len(prompt) > 0 and int(prompt[0]) in template.controls.values())
    notes = []

    def last_of_prompt(length: int) -> np.ndarray:
        """Mask of tokens to keep: the start token and the last ones."""
        index = np.arange(len(prompt))
        return (index < start) | (index >= len(prompt) - (length - start))

    kept = np.ones(len(prompt), bool)
    if recipe.max_prompt_length and len(prompt) > recipe.max_prompt_length:
        kept = last_of_prompt(recipe.max_prompt_length)
        notes.append("prompt cut to max_prompt_length")
    tails = [np.zeros(0, np.int32)] * len(answers)
    _, longest = lengths_of(parts)
    if recipe.task == "prompt":
        if not len(prompt):
            raise Dropped("prompt without tokens")
        if kept.sum() > recipe.max_length:
            raise Dropped("prompt leaves no room for an answer")
        return Parts(prompt[kept], prompt_learned[kept], answers, (prompt[~kept], *tails)), notes
    if kept.sum() + longest > recipe.max_length:
        if recipe.truncation == "drop":
            raise Dropped("longer than max_length")
        if recipe.truncation == "keep_end" and recipe.task != "label":
            if longest + start >= recipe.max_length:
                raise Dropped("answer as long as max_length")
            kept = last_of_prompt(recipe.max_length - longest)
        else:
            room = max(recipe.max_length - int(kept.sum()), 0)
            closing = int(template.encoder and room > 0)  # encoders keep the closing token

            def keeps(tokens: np.ndarray) -> np.ndarray:
                place, length = np.arange(len(tokens)), len(tokens)
                return (length <= room) | (place < room - closing) | (place >= length - closing)

            tails = [tokens[~keeps(tokens)] for tokens, _ in answers]
            answers = [(tokens[keeps(tokens)], mask[keeps(tokens)]) for tokens, mask in answers]
        notes.append(f"{CUT} ({recipe.truncation})")
    lost, prompt, prompt_learned = prompt[~kept], prompt[kept], prompt_learned[kept]
    # no token predicts the first one, which in a packed row follows another example
    prompt_learned = prompt_learned & (np.arange(len(prompt)) > 0)
    if not len(prompt):
        answers = [(tokens, mask & (np.arange(len(mask)) > 0)) for tokens, mask in answers]
    if recipe.task != "label":
        if not all(mask.any() for _, mask in answers):
            raise Dropped("nothing left to learn within max_length")
    first = {tokens.tobytes(): i for i, (tokens, _) in reversed(list(enumerate(answers)))}
    if len(first) < len(answers):
        if len(first) < 2:
            raise Dropped("identical answers")
        kept = sorted(first.values())
        ranks = [ranks[i] for i in kept] if ranks else None
        untied(ranks or range(len(kept)))
        answers, tails = [answers[i] for i in kept], [tails[i] for i in kept]
        notes.append("an answer that repeats a better one left out")
    return Parts(prompt, prompt_learned, list(answers), (lost, *tails), ranks), notes


def untied(ranks: Sequence[int], compared: str = "all") -> list[int]:
    """Indices of the answers, best first, that are compared: see `Recipe.compared`.

    Raises:
        Dropped: all of them are tied.
    """
    worse = [i for i, rank in enumerate(ranks) if rank > ranks[0]]
    if not worse:
        raise Dropped("all answers tied")
    if compared == "all":
        return list(range(len(ranks)))
    return [0, *(worse if compared == "best_rest" else worse[-1:])]
