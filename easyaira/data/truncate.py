"""Truncation and padding of examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from easyaira.data.examples import Parts
from easyaira.data.recipe import Dropped, Recipe
from easyaira.data.template import Template

CUT = "cut to max_length"  # how the note of a cut begins


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
