"""A conversation in the terminal, and the text of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from easyaira.data.template import Template
from easyaira.errors import escaped
from easyaira.generation.forward import Weights
from easyaira.generation.sampler import Answer, Sampler

CUT = "the answer was cut at max_new_tokens, or at the model's last position"


def text_of(answer: Answer, template: Template, stop_strings: Sequence[str]) -> str:
    """Text of an answer, up to the first stop string."""
    return _until(template.text(answer.content), stop_strings)


def _until(text: str, stop_strings: Sequence[str]) -> str:
    starts = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(starts)] if starts else text


class Live:
    """Writes an answer while it is generated; called with its new tokens.

    Characters that may begin a stop string are held back."""

    def __init__(
        self, template: Template, write: Callable[[str], None], stop_strings: Sequence[str] = ()
    ):
        self.template, self.write, self.stop_strings = template, write, stop_strings
        self.held = max(map(len, stop_strings), default=1) - 1
        self.tokens: list[int] = []
        self.shown = 0  # characters

    def __call__(self, number: int, new: Sequence[int]) -> None:
        self.tokens.extend(new)
        text = self.template.text(self.tokens)
        if text.endswith("\ufffd"):  # half a character
            return
        sure = max(len(text) - self.held, self.shown)
        until = min(sure, len(_until(text, self.stop_strings)))
        self.write(escaped(text[self.shown : until], keep="\n\t"))
        self.shown = until


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
        stop_strings = sampler.sampling.stop_strings
        live = Live(template, write, stop_strings)
        ((_, answer),) = sampler.answers(weights, [tokens], seed=own, progress=live)
        text = text_of(answer, template, stop_strings)
        write(escaped(text[live.shown :], keep="\n\t") + "\n")
        if answer.reason == "length":
            write(f"[{CUT}]\n")
        messages.append({"role": "assistant", "content": text})
