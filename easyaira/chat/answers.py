"""Answers to a question with their scores, while they are generated and after the choice."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from easyaira.chat.choice import GUARD_THRESHOLD, choose, ranking
from easyaira.errors import one_line

STEPS = 4  # tokens between updates of the page


class Controls(NamedTuple):
    """Settings of the page.

    Attributes:
        samples: number of candidates.
        guard: whether candidates below the threshold are dropped.
        sampling: options of `LoadedModel.sampling`.
    """

    samples: int
    guard: bool
    seed: int
    sampling: dict[str, Any]
    threshold: float = GUARD_THRESHOLD


@dataclass
class State:
    """State of the page.

    Attributes:
        texts: the candidates, unfinished while they are generated.
        rewards: their rewards; empty without a reward model, and before they are scored.
        guards: scores of the guard; empty when it is off.
        order: candidates that may be given, best first; None before the choice.
        answer: the chosen one, or the apology; None before the choice.
        problem: why there is no answer, or why scores are missing.
    """

    texts: list[str]
    rewards: list[float] = field(default_factory=list)
    guards: list[float] = field(default_factory=list)
    order: list[int] | None = None
    answer: str | None = None
    problem: str = ""


class Answers:
    """Answers of a language model, chosen by the scores of other models.

    Args:
        model: from `easyaira.load`.
        reward: its `of_answers` gives the rewards; None: candidates keep their order.
        guard: its `of_texts` gives the scores of question and answer; None: no guard.
        apology: the answer when no candidate may be given.
    """

    def __init__(self, model: Any, reward: Any, guard: Any, apology: str):
        self.model, self.reward, self.guard, self.apology = model, reward, guard, apology

    def ask(self, question: str, controls: Controls) -> Iterator[State]:
        """Yield the candidates as they grow, then the choice.

        The model sees only the question, no earlier turn. An error becomes the state's problem; if
        a scorer fails, the answer is the apology.
        """
        state = State([""] * controls.samples)
        try:
            for texts in self._candidates(question, controls):
                state = State(texts)
                yield state
        except Exception as error:  # shown on the page, whatever it is
            yield State([], problem=_reason(error))
            return
        yield self.chosen(question, state.texts, controls)

    def chosen(self, question: str, texts: Sequence[str], controls: Controls) -> State:
        """Score the candidates and choose."""
        state = State(list(texts))
        try:
            state.rewards = self._rewards(question, texts)
            if controls.guard and self.guard is not None:
                scores = self.guard.of_texts([f"{question} {text}" for text in texts])
                state.guards = [float(score) for score in scores]
            rewards = state.rewards or [0.0] * len(texts)
            guards = state.guards if controls.guard and self.guard is not None else None
            state.order = ranking(rewards, guards, controls.threshold)
            state.answer = choose(texts, rewards, guards, self.apology, controls.threshold)
        except Exception as error:  # without scores, nothing may be given
            state.order, state.answer = [], self.apology
            state.problem = _reason(error)
        return state

    def _rewards(self, question: str, texts: Sequence[str]) -> list[float]:
        if self.reward is None:
            return []
        asked = {"role": "user", "content": question}
        pairs = [[asked, {"role": "assistant", "content": text}] for text in texts]
        return [float(score) for score in self.reward.of_answers(pairs)]

    def _candidates(self, question: str, controls: Controls) -> Iterator[list[str]]:
        """Yield all texts whenever one of them has grown."""
        model = self.model
        sampling = model.sampling(**controls.sampling)
        sampler = model.sampler(sampling, controls.samples, STEPS)
        messages = [{"role": "user", "content": question}]
        tokens = model.template.prompt(messages).tolist()
        sampler.limit(tokens, "the question")
        if self.reward is not None:
            self.reward.check(messages)
        grown: queue.Queue[Any] = queue.Queue()
        gone = threading.Event()  # the reader has left

        def progress(number: int, new: Sequence[int]) -> None:
            if gone.is_set():
                raise InterruptedError("the page was closed")
            grown.put((number, new))

        def sample() -> None:
            try:
                with model.model.on(model.mesh):
                    weights = model.weights(sampler)
                    answers = sampler.answers(
                        weights,
                        [tokens],
                        num_samples=controls.samples,
                        seed=controls.seed,
                        progress=progress,
                    )
                    for number, answer in answers:
                        grown.put((number, model.text(answer, sampling)))
                grown.put(None)
            except Exception as error:  # raised again by the reader
                grown.put(error)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        ids: list[list[int]] = [[] for _ in range(controls.samples)]
        texts = [""] * controls.samples
        try:
            while (item := grown.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                number, new = item
                if isinstance(new, str):  # the whole answer
                    texts[number] = new
                else:
                    ids[number] += new
                    text = model.template.text(ids[number])
                    texts[number] = text.removesuffix("\ufffd")  # half a character
                yield list(texts)
        finally:
            gone.set()
            thread.join()


def _reason(error: Exception) -> str:
    return one_line(error)[0].removeprefix("error: ")
