"""Layouts: the text of a template around the contents of a conversation, and what is learned of it.

A template is rendered once per sequence of roles, with placeholders for the contents. The rendering
is split into control tokens, text and placeholders, each of them learned or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from easyaira.data.rendering import Rendered
from easyaira.errors import DataError

# spaces around placeholders, to detect stripping; no template writes them
LEFT, RIGHT = "\u2003", "\u2002"
PLACE = rf"{LEFT}?\ue000\d+\ue001{RIGHT}?"
# what tokenizers strip beside a token: Unicode's White_Space, unlike str.strip
BLANKS = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


def placeholder(message: int) -> str:
    return f"{LEFT}\ue000{message}\ue001{RIGHT}"


class Content(NamedTuple):
    """Placeholder of a message's content, and whether the template strips it."""

    message: int
    lstrip: bool
    rstrip: bool

    def of(self, text: str) -> str:
        text = text.lstrip() if self.lstrip else text
        return text.rstrip() if self.rstrip else text


class Part(NamedTuple):
    """A control token, a text or a placeholder, and whether it is learned."""

    item: int | str | Content
    learned: bool


@dataclass(frozen=True)
class Layout:
    """A rendering with placeholders.

    Attributes:
        pieces: texts and placeholders, as rendered.
        last: index of the last placeholder in `parts`.
        parts: texts, placeholders and control tokens, up to the end of the last answer.
    """

    pieces: tuple[str | Content, ...]
    last: int
    parts: tuple[Part, ...]

    def filled(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The rendering with these contents."""
        return "".join(
            piece if isinstance(piece, str) else piece.of(messages[piece.message]["content"])
            for piece in self.pieces
        )

    @property
    def prompt(self) -> tuple[Part, ...]:
        """The parts before the last answer."""
        start = self.last
        while start and self.parts[start - 1].learned:
            start -= 1
        return self.parts[:start]


def layout_of(
    rendered: Rendered, roles: Sequence[str], controls: Mapping[str, int], end: int, opening: str
) -> Layout:
    """Split a rendering with placeholders.

    Args:
        rendered: the rendering.
        roles: those of the messages.
        controls: control tokens.
        end: control token that ends the last answer where the template writes none.
        opening: text that the template writes between a generation prompt and the content.

    Raises:
        DataError: the template drops or repeats a turn, or does not mark the last answer.
    """
    text = rendered.text
    pieces: list[str | Content] = list(re.split(f"({PLACE})", text))
    pieces[1::2] = map(_content, pieces[1::2])
    shown = [content.message for content in pieces[1::2]]
    if shown != list(range(len(roles))):
        lost = [role for i, role in enumerate(roles) if i not in set(shown)]
        raise DataError(f"the template drops or repeats a turn: {', '.join(lost or roles)}")
    marks = rendered.marks
    if marks is None:
        marks = [
            (place.start() - len(opening) * text.endswith(opening, 0, place.start()), place.end())
            for place, role in zip(re.finditer(PLACE, text), roles, strict=True)
            if role == "assistant"
        ]
    parts = list(_with_ends(_with_spaces(list(_parts(text, marks, controls)))))
    contents = [i for i, part in enumerate(parts) if isinstance(part.item, Content)]
    answers = [i for i, role in zip(contents, roles, strict=False) if role == "assistant"]
    if len(contents) < len(roles) or (answers and not parts[answers[-1]].learned):
        raise DataError("the template's {% generation %} blocks leave out or cut the last answer")
    last = contents[-1]
    if roles[-1] == "assistant":
        return Layout(tuple(pieces), last, tuple(_until_end(parts, last, end)))
    return Layout(tuple(pieces), last, tuple(parts[: last + 1]))


def _content(piece: str) -> Content:
    number = int(piece.strip(LEFT + RIGHT)[1:-1])
    return Content(number, not piece.startswith(LEFT), not piece.endswith(RIGHT))


def _parts(
    text: str, marks: Sequence[tuple[int, int]], controls: Mapping[str, int]
) -> Iterator[Part]:
    """Split `text`; what lies inside a mark is learned."""
    pattern = re.compile(f"({PLACE}|{any_of(controls).pattern})")
    sections, done = [], 0
    for start, stop in [*sorted(marks), (len(text), len(text))]:
        sections += [(text[done:start], False), (text[max(done, start) : stop], True)]
        done = max(done, stop)
    for section, learned in sections:
        for piece in re.split(pattern, section):
            if piece in controls:
                yield Part(controls[piece], learned)
            elif re.fullmatch(PLACE, piece):
                yield Part(_content(piece), learned)
            elif piece:
                yield Part(piece, learned)


def _with_spaces(parts: Sequence[Part]) -> Iterator[Part]:
    """Move text into the answer beside it: spaces before it, since tokenizers merge a space with
    the next word; and text up to its control token, if blank or equal to the text that closes the
    last answer."""
    items = [part.item for part in parts]
    tokens = [isinstance(item, int) for item in items] + [False, False]
    answers = [part.learned and not isinstance(part.item, int) for part in parts] + [False]
    last = max((i for i, item in enumerate(items) if isinstance(item, Content)), default=-1)
    closing = items[last + 1] if tokens[last + 2] else None
    for i, (item, learned) in enumerate(parts):
        if learned or not isinstance(item, str):
            yield parts[i]
        elif answers[i - 1] and tokens[i + 1] and (not item.strip() or item == closing):
            yield Part(item, True)
        elif answers[i + 1]:
            text = item.rstrip(" ")
            yield from (
                Part(*part) for part in ((text, False), (item[len(text) :], True)) if part[0]
            )
        else:
            yield parts[i]


def _with_ends(parts: Iterable[Part]) -> Iterator[Part]:
    """Mark the control token that follows an answer as learned."""
    ends = False
    for part in parts:
        token = isinstance(part.item, int)
        yield Part(part.item, part.learned or (token and ends))
        ends = part.learned and not token


def _until_end(parts: Sequence[Part], last: int, end: int) -> Iterator[Part]:
    """The parts up to the control token that ends the last answer."""
    yield from parts[: last + 1]
    for part in parts[last + 1 :]:
        if not part.learned:
            break
        yield part
        if isinstance(part.item, int):
            return
    yield Part(end, True)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Pattern that matches any of `words`, longest first; no words match nothing."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def stripped(
    items: Iterable[tuple[int | str, bool]], left: set[int], right: set[int]
) -> list[tuple[int | str, bool]]:
    """Strip the texts beside control tokens that take the blanks on their left or right."""
    kept: list[tuple[int | str, bool]] = []
    strips = False
    for item, learned in items:
        if isinstance(item, str):
            text = item.lstrip(BLANKS) if strips else item
            if text or not item:
                kept.append((text, learned))
            strips = strips and not text
            continue
        while item in left and kept and isinstance(kept[-1][0], str):
            text, before_learned = kept.pop()
            if text := text.rstrip(BLANKS):
                kept.append((text, before_learned))
                break
        kept.append((item, learned))
        strips = item in right
    return kept
