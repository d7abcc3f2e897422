"""A row that notes which of its columns and keys are read, so that filled ones that are not read
can be reported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

SYSTEM = ("system", "system_prompt")  # columns of text that goes before the prompt
HISTORY = "history"  # column of turns before the prompt
WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_mask")  # keys of a message

# names that say nothing about what is learned, and those that do
HARMLESS = re.compile(
    r"(.*_)?(id|ids|uuid|idx|index|hash|url|urls)|unused.*|source|dataset|language|lang|license"
    r"|created|created_at|timestamp|date"
)
MATTERS = frozenset(
    (*SYSTEM, *WEIGHTS, HISTORY, "prompt", "instruction", "input", "context", "documents")
    + ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "chat_template_kwargs")
    + ("reasoning", "reasoning_content", "thinking", "label", "labels", "weights", "margin")
    + ("mask", "masked", "train_detail", "prefix", "image", "images", "image_url", "image_urls")
    + ("audio", "audio_url", "input_audio", "video", "videos", "video_url", "file")
)


class Unreadable(Exception):
    """The content of a row does not match its columns; the message says why."""


class Record(Mapping[str, Any]):
    """A row, or a message of one, that notes which of its columns or keys are read."""

    def __init__(self, content: Mapping[str, Any], name: str = ""):
        self._content, self._name = content, name
        self._read: set[str] = set()
        self._parts: list[Record] = []
        self.notes: list[str] = []  # what a report should say of this row

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._content[key]

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def part(self, content: Any, name: str) -> Record:
        """A message in this row, or a part of this message."""
        if not isinstance(content, Mapping):
            raise Unreadable(f"column {name}: a message must be {{role: ..., content: text}}")
        self._parts.append(Record(content, name))
        return self._parts[-1]

    def filled(self, key: str) -> bool:
        return _filled(self._content.get(key))

    def unread(self, fix: str) -> Iterator[str]:
        """Filled columns and keys that were not read, less those that are harmless.

        Args:
            fix: what to do with a column, with {} for its name.

        Raises:
            Unreadable: one of them would change what is learned.
        """
        where = f"column {self._name}: key" if self._name else "column"
        for key in self._content:
            if key in self._read or not self.filled(key):
                continue
            if key in MATTERS:
                fix = "remove the key" if self._name else fix.format(key)
                raise Unreadable(
                    f"{where} {key} is filled and would not be used; join it to the text, or {fix}"
                )
            if not HARMLESS.fullmatch(str(key)):
                yield f"{where} {key}"
        for part in self._parts:
            yield from part.unread(fix)


def _filled(value: Any) -> bool:
    """Whether there is anything in a value; 0 and false are something."""
    left = [value]  # grows below: JSON nests deeper than Python calls
    for value in left:
        if isinstance(value, Mapping | list | tuple):
            left += value.values() if isinstance(value, Mapping) else value
        elif value is not None and value == value and value != "":  # NaN is not itself
            return True
    return False
