"""Rows to examples: tokenised, cut to length, and every row accounted for.

An example is a prompt with one answer (SFT) or two (DPO: chosen, rejected). All lie one after
another in flat arrays, so that a million of them cost no more than their tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from easyaira.config import DataConfig, Source
from easyaira.data import sources
from easyaira.data.templates import Template
from easyaira.errors import DataError, TokenizerError

CHUNK = 1000  # rows that are tokenised together


@dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        tokens: [total] all prompts and answers.
        learned: [total] which of them carry loss.
        bounds: [n, answers + 2] where the prompt and each answer of an example start, and its end.
        rows: [n] the row of the sources that an example comes from, counted from 0.
        prompt_ids: [n] a hash of each prompt before any cut; equal prompts are never split apart.
    """

    tokens: np.ndarray
    learned: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray
    prompt_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def answers(self) -> int:
        return self.bounds.shape[1] - 2

    def lengths(self) -> np.ndarray:
        """[n, answers] tokens of the prompt with each answer."""
        prompt = self.bounds[:, 1] - self.bounds[:, 0]
        return prompt[:, None] + np.diff(self.bounds[:, 1:])

    def take(self, index: np.ndarray) -> Examples:
        return replace(
            self,
            bounds=self.bounds[index],
            rows=self.rows[index],
            prompt_ids=self.prompt_ids[index],
        )

    def fingerprint(self) -> str:
        """Of the tokens, what is learned of them, and their order."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.learned, self.bounds):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


@dataclass
class Account:
    """What became of the rows that were read: kept + dropped = read."""

    read: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    cut: Counter = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, place)

    def told(self) -> str:
        reasons = [
            f"{n} {reason} (first: {self.first_dropped[reason]})"
            for reason, n in self.dropped.items()
        ]
        return f"{self.kept} of {self.read} rows" + (
            f"; dropped {', '.join(reasons)}" if reasons else ""
        )

    def check(self, max_dropped: float) -> None:
        """Raises DataError if nothing, or too little, is left."""
        lost = self.read - self.kept
        if not self.kept or lost > max_dropped * self.read:
            raise DataError(
                f"data: only {self.told()}; allowed is a share of {max_dropped}. Mend the rows, or "
                "raise data.max_dropped"
            )


class Dropped(Exception):
    """A row that cannot be trained on, with the reason."""


def build(
    located_rows: Iterable[sources.Located],
    *,
    pairs: bool,
    template: Template,
    config: DataConfig,
    max_length: int,
    learn_prompts: bool = False,
    label: str = "data",
) -> tuple[Examples, Account]:
    """Tokenise rows, cut them as `config` says, and count what became of each.

    Args:
        located_rows: rows with their places.
        pairs: rows are preference pairs, not conversations.
        template: how messages become tokens.
        config: max_prompt_length and truncation.
        max_length: longest prompt with answer, in tokens.
        learn_prompts: prompts carry loss too.
        label: what the progress bar says.

    Raises:
        DataError: a row that cannot be read as what it should be.
    """
    account = Account()
    parts: list[tuple[np.ndarray, np.ndarray]] = []  # (tokens, learned): prompt, answer, answer...
    rows: list[int] = []
    prompt_ids: list[int] = []
    for chunk in _chunks(tqdm(located_rows, desc=f"reading {label}", unit=" rows", disable=None)):
        readable = []
        for located in chunk:
            account.read += 1
            try:
                readable.append((account.read - 1, located.place, _texts(located, pairs, template)))
            except Dropped as reason:
                account.drop(str(reason), located.place)
        encoded = iter(template.encode([text for *_, texts in readable for text in texts]))
        for row, place, texts in readable:
            sides = [_split(next(encoded), pairs) for _ in texts]
            prompt, answers = sides[0][0], [answer for _, answer in sides]
            try:
                prompt_cut, answers = _cut(prompt, answers, template, config, max_length, account)
            except Dropped as reason:
                account.drop(str(reason), place)
                continue
            prompt_learned = np.full(len(prompt_cut), learn_prompts)
            prompt_learned[:1] = False  # nothing stands before a first token
            parts += [(prompt_cut, prompt_learned), *answers]
            rows.append(row)
            prompt_ids.append(_hash(prompt))
    account.kept = len(rows)
    ends = np.cumsum([0, *(len(tokens) for tokens, _ in parts)])
    per_example = len(parts) // max(len(rows), 1)
    starts = np.arange(len(rows)) * per_example
    empty = (np.zeros(0, np.int32), np.zeros(0, bool))
    tokens, learned = (np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True))
    return Examples(
        tokens=tokens,
        learned=learned,
        bounds=ends[starts[:, None] + np.arange(per_example + 1)],
        rows=np.array(rows, np.int64),
        prompt_ids=np.array(prompt_ids, np.uint64),
    ), account


def _chunks(rows: Iterable[sources.Located]) -> Iterator[list[sources.Located]]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _hash(prompt: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(prompt.tobytes(), digest_size=8).digest(), "little")


def _texts(
    located: sources.Located, pairs: bool, template: Template
) -> list[list[sources.Message]]:
    """The conversations of a row: one, or with each of two answers."""
    if pairs:
        before, chosen, rejected = sources.pair(located)
        if chosen.strip() == rejected.strip():
            raise Dropped("identical answers")
        texts = [[*before, {"role": "assistant", "content": side}] for side in (chosen, rejected)]
    else:
        texts = [sources.conversation(located)]
    for messages in texts:
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        if not answers or not (answers[-1] if pairs else all(answers)):
            raise Dropped("empty answer")
        try:
            template.accepts(messages)
        except DataError as error:
            raise Dropped(str(error)) from error
    return texts


Answer = tuple[np.ndarray, np.ndarray]  # tokens, learned


def _split(spans: list[tuple[np.ndarray, bool]], pairs: bool) -> tuple[np.ndarray, Answer]:
    """A conversation as its prompt and its answer: all that follows the first learned token, or in
    a pair the last answer only."""
    learned = [i for i, (_, is_learned) in enumerate(spans) if is_learned]
    first = learned[-1] if pairs else learned[0]
    empty = np.zeros(0, np.int32)
    prompt = np.concatenate([empty, *(tokens for tokens, _ in spans[:first])])
    answer = [(tokens, np.full(len(tokens), is_learned)) for tokens, is_learned in spans[first:]]
    tokens, mask = (np.concatenate(arrays) for arrays in zip(*answer, strict=True))
    return prompt, (tokens, mask)


def _cut(
    prompt: np.ndarray,
    answers: list[Answer],
    template: Template,
    config: DataConfig,
    max_length: int,
    account: Account,
) -> tuple[np.ndarray, list[Answer]]:
    """Prompt and answers within the lengths; both answers of a pair are cut alike."""
    start = int(len(prompt) > 0 and int(prompt[0]) in template.controls.values())

    def last_of_prompt(length: int) -> np.ndarray:
        return np.concatenate([prompt[:start], prompt[len(prompt) - (length - start) :]])

    if config.max_prompt_length and len(prompt) > config.max_prompt_length:
        prompt = last_of_prompt(config.max_prompt_length)
        account.cut["prompt to max_prompt_length"] += 1
    longest = max(len(tokens) for tokens, _ in answers)
    if len(prompt) + longest > max_length:
        if config.truncation == "drop":
            raise Dropped("longer than max_length")
        if config.truncation == "keep_end":
            if longest + start >= max_length:
                raise Dropped("answer as long as max_length")
            prompt = last_of_prompt(max_length - longest)
        else:
            room = max(max_length - len(prompt), 0)
            answers = [(tokens[:room], mask[:room]) for tokens, mask in answers]
        account.cut[f"to max_length ({config.truncation})"] += 1
    if not all(mask[0 if len(prompt) else 1 :].any() for _, mask in answers):
        raise Dropped("nothing left to learn within max_length")
    if len(answers) == 2 and np.array_equal(answers[0][0], answers[1][0]):
        raise Dropped("identical answers")
    return prompt, answers


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Split by prompt: (the rest, held out). No prompt is on both sides.

    Raises:
        DataError: there are too few prompts to have some on each side.
    """
    prompts = np.unique(examples.prompt_ids)
    count = math.ceil(share * len(prompts))
    if not 0 < count < len(prompts):
        raise DataError(f"data.eval: {share} of {len(prompts)} prompts leaves nothing on one side")
    chosen = np.random.default_rng([seed, 1]).permutation(prompts)[:count]
    held_out = np.isin(examples.prompt_ids, chosen)
    return examples.take(~held_out), examples.take(held_out)


@dataclass(frozen=True)
class Data:
    """What a run trains and is measured on, and the report of how it came about."""

    train: Examples
    held_out: Examples | None
    report: dict[str, Any]


def load(
    config: DataConfig,
    *,
    pairs: bool,
    template: Template,
    vocab_size: int,
    max_length: int,
    seed: int,
    learn_prompts: bool = False,
) -> Data:
    """Read, tokenise, count and split all that `config` names.

    Raises:
        DataError: no usable rows, or more than config.max_dropped of them lost.
        TokenizerError: a token id without an embedding.
    """

    def of(what: str | Sequence[Source], label: str) -> tuple[Examples, Account]:
        listed = [Source(what, config.split, config.columns)] if isinstance(what, str) else what
        rows = (located for source in listed for located in sources.read(source))
        examples, account = build(
            rows,
            pairs=pairs,
            template=template,
            config=config,
            max_length=max_length,
            learn_prompts=learn_prompts,
            label=label,
        )
        account.check(config.max_dropped)
        if len(examples.tokens) and (largest := int(examples.tokens.max())) >= vocab_size:
            raise TokenizerError(
                f"tokenizer: gives id {largest} and the embedding has {vocab_size} rows; use the "
                "model's own tokenizer, or set model.resize"
            )
        return examples, account

    train, account = of(config.train, "train")
    held_out = None
    report = {"train": _report(train, account)}
    if isinstance(config.eval, float):
        train, held_out = hold_out(train, config.eval, seed)
        report["train"]["trained on"] = len(train)
        report["held_out"] = {"rows": len(held_out), "share of prompts": config.eval}
    elif config.eval is not None:
        held_out, account = of(config.eval, "held-out")
        report["held_out"] = _report(held_out, account)
    report["fingerprint"] = train.fingerprint()
    report["template"] = template.name
    report["max_length"] = max_length
    return Data(train, held_out, report)


def _report(examples: Examples, account: Account) -> dict[str, Any]:
    lengths = examples.lengths().ravel()
    quantiles = {"shortest": 0, "median": 50, "95 %": 95, "longest": 100}
    return {
        "read": account.read,
        "kept": account.kept,
        "dropped": dict(account.dropped),
        "first dropped": account.first_dropped,
        "cut": dict(account.cut),
        "tokens": int(lengths.sum()),
        "learned tokens": int(examples.learned.sum()),
        "length": {name: int(np.percentile(lengths, q)) for name, q in quantiles.items()},
    }
