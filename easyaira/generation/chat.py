"""A conversation in the terminal, and the text of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from easyaira.data.template import Template
from easyaira.errors import escaped
from easyaira.generation.programs import Weights
from easyaira.generation.sampler import Answer, Sampler

CUT = "the answer was cut at max_new_tokens, or at the model's last position"


def text_of(answer: Answer, template: Template, stop_strings: Sequence[str]) -> str:
    """Text of an answer, up to the first stop string."""
    text = template.text(answer.content)
    starts = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(starts)] if starts else text


class Live:
    """Writes an answer while it is generated; called with its new tokens."""

    def __init__(self, template: Template, write: Callable[[str], None]):
        self.template, self.write = template, write
        self.tokens: list[int] = []
        self.shown = 0  # characters

    def __call__(self, number: int, new: Sequence[int]) -> None:
        self.tokens.extend(new)
        text = self.template.text(self.tokens)
        if not text.endswith("\ufffd"):  # half a character
            self.write(escaped(text[self.shown :], keep="\n\t"))
            self.shown = len(text)


def chat(
    sampler: Sampler,
    weights: Weights,
    template: Template,
    questions: Iterable[str],
    write: Callable[[str], None],
    seed: int,
) -> None:
    """Answer one question after another, writing each answer while it is generated.

    Raises:
        DataError: the conversation fills the model's positions.
    """
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        tokens = template.prompt(messages).tolist()
        sampler.limit(tokens, "the conversation")
        own = (seed + len(messages) // 2) % 2**32  # each answer has its own random numbers
        live = Live(template, write)
        ((_, answer),) = sampler.answers(weights, [tokens], seed=own, progress=live)
        rest = template.text(answer.content)[live.shown :]
        write(escaped(rest, keep="\n\t") + "\n")
        if answer.reason == "length":
            write(f"[{CUT}]\n")
        text = text_of(answer, template, sampler.sampling.stop_strings)
        messages.append({"role": "assistant", "content": text})
