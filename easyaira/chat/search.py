"""Search of the data by TF-IDF, to see what a model may have learned an answer from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from easyaira.config.data import Source
from easyaira.data import columns, sources
from easyaira.data.answers import compared
from easyaira.data.recipe import Dropped
from easyaira.errors import ConfigError, DataError

SHOWN = 10
SIDES = ("prompt", "completion")


class Hit(NamedTuple):
    similarity: float
    prompt: str
    completion: str


class Search:
    """An index of the prompts and one of the completions of a data set.

    Args:
        path: file, folder or hub id of prompts with completions, of texts, or of pairs or
            ranked answers (the best ones).

    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: the data cannot be read, or hold no words.
    """

    def __init__(self, path: str):
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise ConfigError('--search: needs scikit-learn; pip install ".[demo]"') from error
        self.rows = list(_texts(path))
        self.indices: dict[str, tuple[Any, Any]] = {}
        for number, side in enumerate(SIDES):
            vectorizer = TfidfVectorizer()
            try:
                matrix = vectorizer.fit_transform([row[number] for row in self.rows])
            except ValueError:  # no words: plain text has no prompts
                continue
            self.indices[side] = vectorizer, matrix
        if not self.indices:
            raise DataError(f"{path}: its rows hold no words to search")

    def find(self, text: str, side: str) -> list[Hit]:
        """The SHOWN rows whose `side` has the highest cosine similarity to the text."""
        if side not in self.indices:
            return []
        vectorizer, matrix = self.indices[side]
        similarity = (matrix @ vectorizer.transform([text]).T).toarray()[:, 0]  # of unit vectors
        order = (-similarity).argsort(kind="stable")[:SHOWN]
        return [Hit(float(similarity[i]), *self.rows[i]) for i in order]


def _texts(path: str) -> Iterator[tuple[str, str]]:
    """Prompt and completion of each readable row."""
    form, count = None, 0
    for place, row in sources.read(Source(path)):
        if isinstance(row, sources.BadRow):
            continue
        if form is None:
            task = "pair" if any(f.fits(list(row)) for f in columns.FORMS["pair"]) else ""
            try:
                form = columns.form_of(list(row), task or "conversation")
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
        try:
            if task:
                prompt, (answer, *_), _ = compared(columns.Record(row), form)
            else:
                messages, asked = columns.conversation(columns.Record(row), form)
                prompt, answer = messages[:asked] or messages[:-1], messages[-1]["content"]
        except (columns.Unreadable, Dropped):
            continue
        count += 1
        yield "\n".join(turn["content"] for turn in prompt), answer
    if not count:
        raise DataError(f"{path}: no row could be read; easyaira inspect says why")
