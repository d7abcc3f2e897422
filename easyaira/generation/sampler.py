"""Continuous batching: answers to prompts of any lengths, where finished rows give their places to
waiting prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from easyaira.data.examples import check_embedded
from easyaira.distributed.sharding import on_one_cpu
from easyaira.errors import DataError, WeightsError
from easyaira.generation.forward import Prefilled, Weights
from easyaira.generation.processors import Sampling
from easyaira.generation.programs import STEPS, Programs, State
from easyaira.models.model import Model

ROWS = 64  # answered at a time
FEWEST_ROWS = 8  # fewer rows take as long: the weights are read once per step
FEWEST_SLOTS = 64  # of the cache
SLOTS_AT_ONCE = 256  # of few rows: empty slots cost less than a program for each size
FEWEST_TOKENS = 16  # of a prefill's rows
PREFILL_ROWS = 16  # prompts of a prefill, of similar lengths
PREFILL_TOKENS = 2**14


class Answer(NamedTuple):
    """A generated answer.

    Attributes:
        tokens: with the end token, if there is one.
        logps: log-probability of each token under the model's own distribution.
        reason: `end` (an end token), `stop` (a stop string) or `length`.
    """

    tokens: list[int]
    logps: list[float]
    reason: str

    @property
    def content(self) -> list[int]:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.reason == "end" else self.tokens


@dataclass
class _Row:
    """An answer under way."""

    number: int
    prompt: int
    length: int  # tokens in the cache
    limit: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


Progress = Callable[[int, Sequence[int]], None]


class Sampler:
    """Generates answers with one model.

    Args:
        model: a language model.
        sampling: how to choose tokens and when to stop.
        text: decodes tokens; needed for stop strings.
        rows: answers under way at a time.
        steps: tokens per row and call of `decode`, at most STEPS; None: STEPS.
        programs: programs of the model's other samplers, to reuse.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        *,
        text: Callable[[Sequence[int]], str] | None = None,
        rows: int = ROWS,
        steps: int | None = None,
        programs: Iterable[Programs] = (),
    ):
        self.model, self.sampling, self.text = model, sampling, text
        self.rows = 1 << (rows.bit_length() - 1)  # a power of two
        self.steps = min(steps or STEPS, STEPS)
        self.programs = Programs(model, sampling, programs)

    def weights(self, params: Any) -> Weights:
        """Prepare weights once for any number of calls of `answers`."""
        return self.programs.weights(params)

    def read(self, load: Callable[..., Any]) -> Weights:
        """The weights of `load(each=...)`, prepared one by one, so that none is held twice."""
        programs = self.programs

        def held(path: tuple, leaf: jax.Array) -> Any:
            return programs.held(programs.forward.form(path), leaf)

        return programs.with_head(load(each=held))

    def limit(self, prompt: Sequence[int], name: str = "the prompt") -> int:
        """Maximal length of the answer to a prompt.

        Raises:
            DataError: there is no room for one.
            TokenizerError: a token has no embedding.
        """
        check_embedded(prompt, self.model.vocab_size)
        length, positions = len(prompt), self.model.config.max_positions
        if not length:
            raise DataError(
                f"{name} is a prompt without tokens, and this tokenizer has no start token; give a "
                "text"
            )
        if length >= positions:
            raise DataError(
                f"{name} has {length} tokens and leaves no room in the model's {positions} "
                "positions; shorten it"
            )
        return min(self.sampling.max_new_tokens, positions - length)

    def largest_cache(self, lengths: Sequence[int], num_samples: int = 1) -> tuple[int, int]:
        """Upper bounds on the rows and slots of the cache, for prompts of these lengths."""
        positions = self.model.config.max_positions
        limits = [min(self.sampling.max_new_tokens, positions - length) for length in lengths]
        rows = _power(min(len(lengths) * num_samples, self.rows))
        last = max(map(_last_slots, lengths, limits))
        slots = max(last, max(lengths) + self.steps)  # it grows when it is full, see `fit`
        return rows, _rounded(slots, FEWEST_SLOTS)

    def answers(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int = 1,
        seed: int = 0,
        first: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (number, answer) as answers end: i * num_samples + s for sample s of prompt i.

        An answer depends on its prompt, its number and the seed, and on nothing else: neither on
        the other prompts and their order, nor on rows, steps or mesh. That holds as long as the
        rounding of float32, which differs between shapes, does not decide between two tokens.

        Args:
            prompts: token ids, of any lengths.
            first: leave out the answers before this number.
            progress: called with a number and the new tokens of its answer.

        Raises:
            DataError: a prompt is empty, or fills all of the model's positions.
            WeightsError: the logits are not finite.
        """
        limits = [self.limit(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        numbers = deque(range(first, len(prompts) * num_samples))
        waiting = deque(_Row(n, n // num_samples, 0, limits[n // num_samples]) for n in numbers)
        if waiting:
            run = _Run(self, weights, prompts, waiting, seed, progress)
            yield from run.answers()


class _Run:
    """The rows of one call of `Sampler.answers`."""

    def __init__(self, sampler, weights, prompts, waiting, seed, progress):
        self.sampler, self.programs = sampler, sampler.programs
        self.weights, self.prompts, self.waiting = weights, prompts, waiting
        self.seed, self.progress = np.uint32(seed), progress
        rows = min(len(waiting), sampler.rows)
        self.sizes = _sizes(_power(rows))
        self.places: list[_Row | None] = [None] * self.size(rows)
        self.state: State | None = None
        self.slots = 0
        self.held: tuple[Prefilled, dict[int, int]] | None = None  # and its row of each prompt

    def size(self, rows: int) -> int:
        """Number of places for so many rows."""
        return min(size for size in self.sizes if size >= rows)

    def running(self) -> list[_Row]:
        return [row for row in self.places if row is not None]

    def answers(self) -> Iterator[tuple[int, Answer]]:
        while self.waiting or self.running():
            free = len(self.places) - len(self.running())
            if self.waiting and free >= min(self.refill(), len(self.waiting)):
                yield from self.admit()
            if self.running():
                yield from self.decode()

    def refill(self) -> int:
        """Number of free places that is worth a prefill."""
        return max(1, len(self.places) // 8)

    def admit(self) -> Iterator[tuple[int, Answer]]:
        """Fill free places with waiting rows; prompts of similar lengths are computed at once."""
        free = [place for place, row in enumerate(self.places) if row is None]
        next_ones = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        next_ones.sort(key=lambda row: len(self.prompts[row.prompt]))
        self.waiting.extendleft(reversed(next_ones))
        while free and self.waiting:
            if self.held is None or self.waiting[0].prompt not in self.held[1]:
                self.held = self.prefill(len(free))
            prefilled, row_of = self.held
            taken: list[tuple[int, _Row]] = []
            while free and self.waiting and self.waiting[0].prompt in row_of:
                row = self.waiting.popleft()
                row.length = len(self.prompts[row.prompt])
                taken.append((free.pop(0), row))
            for place, row in taken:
                self.places[place] = row
            self.fit()
            columns = np.zeros((4, len(self.places)), np.int32)
            for i, (place, row) in enumerate(taken):
                columns[:, i] = row_of[row.prompt], place, row.limit, row.number
            self.state, read = self.programs.admit(
                self.state, prefilled, self.seed, np.int32(len(taken)), *columns
            )
            yield from self.collect(read)
        if not self.waiting:
            self.held = None

    def prefill(self, free: int) -> tuple[Prefilled, dict[int, int]]:
        """Compute the prompts of the next rows, each once."""
        positions = self.sampler.model.config.max_positions
        chosen: list[int] = []
        longest = 0
        for row, _ in zip(self.waiting, range(free), strict=False):
            length = max(longest, len(self.prompts[row.prompt]))
            if row.prompt in chosen:
                continue
            tokens = (len(chosen) + 1) * length
            if len(chosen) == PREFILL_ROWS or (chosen and tokens > PREFILL_TOKENS):
                break
            chosen.append(row.prompt)
            longest = length
        width = min(_rounded(longest, FEWEST_TOKENS), positions)
        tokens = np.zeros((_power(len(chosen)), width), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for i, prompt in enumerate(chosen):
            lengths[i] = len(self.prompts[prompt])
            tokens[i, : lengths[i]] = self.prompts[prompt]
        prefilled = self.programs.prefill(self.weights, tokens, lengths)
        return prefilled, {prompt: i for i, prompt in enumerate(chosen)}

    def fit(self) -> None:
        """Give the cache the slots that the rows need; drop free places if no row is waiting."""
        rows = self.running()
        longest = max(row.length for row in rows)
        needed = longest + self.sampler.steps
        if len(self.places) <= FEWEST_ROWS:
            needed = max(needed, min(self.last_slots(), SLOTS_AT_ONCE))
        slots = _rounded(needed, FEWEST_SLOTS)
        if longest < self.slots < 2 * slots:
            slots = self.slots
        places = len(self.places)
        if not self.waiting:
            places = self.size(len(rows))
        if self.state is None:
            self.state = self.programs.empty(self.held[0], places, slots)
        elif slots != self.slots or places < len(self.places):
            order = np.arange(len(self.places), dtype=np.int32)
            if places < len(self.places):
                busy = [i for i, row in enumerate(self.places) if row is not None]
                order = np.array((busy + [busy[0]] * places)[:places], np.int32)
                kept = [self.places[i] for i in busy]
                self.places = [*kept, *[None] * (places - len(kept))]
            self.state = self.programs.resize(self.state, slots, order)
        self.slots = slots

    def last_slots(self) -> int:
        """Slots of the cache when the longest answer ends."""
        rows = (*self.running(), *self.waiting)
        return max(_last_slots(len(self.prompts[row.prompt]), row.limit) for row in rows)

    def decode(self) -> Iterator[tuple[int, Answer]]:
        self.fit()
        rows = self.running()
        steps = min(self.sampler.steps, self.slots - max(row.length for row in rows))
        # number of running rows at which to stop, and admit others or drop free places
        if self.waiting:
            enough = len(self.places) - min(self.refill(), len(self.waiting))
        else:
            enough = max((size for size in self.sizes if size < len(self.places)), default=0)
        running = np.array([row is not None for row in self.places])
        self.state, read = self.programs.decode(
            self.weights, self.state, self.seed, running, np.int32(steps), np.int32(enough)
        )
        for row, count in zip(self.places, jax.device_get(read.counts), strict=True):
            if row is not None:
                row.length += int(count)
        yield from self.collect(read)

    def collect(self, read: Any) -> Iterator[tuple[int, Answer]]:
        """Take over new tokens; yield the answers that have ended."""
        tokens, logps, counts = jax.device_get(read)
        if not np.isfinite(logps[np.arange(logps.shape[1]) < counts[:, None]]).all():
            raise WeightsError(
                "the model's logits are not finite; its weights hold NaN, or overflow in this dtype"
            )
        for place, row in enumerate(self.places):
            if row is None or not counts[place]:
                continue
            new = tokens[place, : counts[place]].tolist()
            row.tokens += new
            row.logps += logps[place, : counts[place]].tolist()
            if self.progress:
                self.progress(row.number, new)
            if (answer := self.ended(row)) is not None:
                self.places[place] = None
                yield row.number, answer

    def ended(self, row: _Row) -> Answer | None:
        sampling, text = self.sampler.sampling, self.sampler.text
        if sampling.stop_strings:
            stops = sampling.stop_strings
            if any(stop in text(row.tokens) for stop in stops):
                end = next(
                    n
                    for n in range(1, len(row.tokens) + 1)
                    if any(stop in text(row.tokens[:n]) for stop in stops)
                )
                return Answer(row.tokens[:end], row.logps[:end], "stop")
        if row.tokens[-1] in sampling.end_ids:
            return Answer(row.tokens, row.logps, "end")
        if len(row.tokens) == row.limit:
            return Answer(row.tokens, row.logps, "length")
        return None


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    seed: int = 0,
) -> list[Answer]:
    """All answers in order, see `Sampler.answers`."""
    sampler = Sampler(model, sampling)
    answers = dict(
        sampler.answers(sampler.weights(params), prompts, num_samples=num_samples, seed=seed)
    )
    return [answers[number] for number in sorted(answers)]


def _last_slots(length: int, limit: int) -> int:
    """Slots when an answer of `limit` tokens to a prompt of `length` tokens ends. The newest token
    is not in the cache, and a row that has its last one is not decoded."""
    return length + max(limit - 2, 0) + 1


def _sizes(rows: int) -> list[int]:
    """Numbers of places as rows end, from `rows` down. On a CPU, two per doubling; other devices
    take as long for a few more rows, and several of them divide powers of two evenly."""
    sizes = []
    while rows > FEWEST_ROWS:
        sizes += [rows, rows * 3 // 4] if on_one_cpu() else [rows]
        rows //= 2
    return [*sizes, rows]


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _rounded(size: int, least: int) -> int:
    """Round up to one of two sizes per doubling, so that few programs are compiled."""
    power = _power(max(size, least))
    return power * 3 // 4 if size <= power * 3 // 4 >= least else power
