"""Ask a model questions, from file to file; keep those that cannot be asked, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from easyaira import generate
from easyaira.errors import DataError
from easyaira.generation import sets

ASKED, NOT_ASKED, ANSWERS = "asked.jsonl", "not_asked.jsonl", "answers.jsonl"
CUT = "cut at max_new_tokens"


class Question(NamedTuple):
    """A question to a model.

    Attributes:
        place: file and line that it comes from.
        columns: further columns of its row.
        fault: why it cannot be asked; None if it can.
    """

    place: str
    prompt: str
    columns: Mapping[str, Any]
    fault: str | None = None


def ask(
    questions: Iterable[Question], folder: Path, settings: Mapping[str, Any], args: Any
) -> None:
    """Let a model answer questions, into ANSWERS; continue an interrupted call.

    Args:
        questions: read once, before anything is written.
        settings: everything that determines the questions, for the folder's record.
        args: the model and options of `generate`.

    Raises:
        ConfigError: the folder belongs to another command.
        DataError: no question can be asked.
    """
    loaded, sampling = generate.load(args)
    settings = {**settings, "model": loaded.origin.identity(), "template": args.template}
    sets.check_folder(folder, settings)
    if not (folder / ASKED).exists():
        rows = list(_checked(questions, loaded, loaded.sampler(sampling)))
        faults = [row["fault"] for name, row in rows if name == NOT_ASKED]
        if len(faults) == len(rows):
            raise DataError(f"none of {len(rows)} rows can be asked: {faults[0]}, and so on")
        sets.begin(folder, settings)
        with sets.writing(folder), sets.new_sets(folder, (NOT_ASKED, ASKED)) as put:
            for name, row in rows:
                put(name, row)
    generate.main(generate.file_flags(args, folder / ASKED, folder / ANSWERS))


def _checked(
    questions: Iterable[Question], loaded: Any, sampler: Any
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the file and the row of each question."""
    for place, prompt, columns, fault in questions:
        if fault is None:
            try:
                tokens = loaded.template.prompt([{"role": "user", "content": prompt}])
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
            try:
                sampler.limit(tokens)
            except DataError:
                fault = "no room for an answer"
        if fault is None:
            yield ASKED, {"prompt": prompt, **columns}
        else:
            yield NOT_ASKED, {**columns, "fault": fault}
