"""Tasks from local files: the harness's own definitions with rows of files in the place of the
hub's, and definitions in tasks/ for data that the harness has no task for."""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from easyaira.config.data import Source
from easyaira.data import sources
from easyaira.errors import ConfigError, DataError

TASKS = Path(__file__).with_name("tasks")
LETTERS = tuple("ABCDE")  # of a question's choices
Row = Mapping[str, Any]


def _labelled(row: Row, column: str, labels: Collection[Any]) -> Row:
    """The row as it is, if its column holds one of the labels."""
    if row[column] not in labels:
        raise ValueError(
            f"column {column} is {row[column]!r}, not one of {', '.join(map(str, labels))}"
        )
    return row


def _arc(row: Row) -> Row:
    """Rows of llm-foundry, `query, choices, gold`, as those of allenai/ai2_arc."""
    if not all(choice.strip() for choice in row["choices"]):
        raise ValueError("an empty choice")
    letters = list(string.ascii_uppercase[: len(row["choices"])])
    _labelled(row, "gold", range(len(letters)))  # -1 would be the last one
    return {
        "question": row["query"].removeprefix("Question: "),
        "choices": {"text": row["choices"], "label": letters},
        "answerKey": letters[row["gold"]],
    }


def _truthfulqa(row: Row) -> Row:
    """The columns of the original CSV as those of truthfulqa/truthful_qa."""

    def targets(correct: list[str]) -> dict[str, list]:
        wrong = _answers(row["Incorrect Answers"])
        labels = [1] * len(correct) + [0] * len(wrong)
        return {"choices": correct + wrong, "labels": labels}

    return {
        "question": row["Question"],
        "mc1_targets": targets([row["Best Answer"].strip()]),
        "mc2_targets": targets(_answers(row["Correct Answers"])),
    }


def _answers(text: str) -> list[str]:
    return [answer.strip() for answer in text.split(";") if answer.strip()]


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation']}"}


class Local(NamedTuple):
    """A task from a file.

    Attributes:
        file: name of the file.
        rows: turns a row of the file into one of the task's.
        harness: folder of the definition among the harness's tasks; None: it is in TASKS.
        changed: entries of the definition to replace.
    """

    file: str
    rows: Callable[[Row], Row]
    harness: str | None = None
    changed: Mapping[str, Any] = {}


LOCAL = {
    "arc_challenge": Local("arc_challenge.jsonl.gz", _arc, "arc"),
    "arc_easy": Local("arc_easy.jsonl.gz", _arc, "arc"),
    "truthfulqa_mc1": Local("TruthfulQA.csv", _truthfulqa, "truthfulqa"),
    "truthfulqa_mc2": Local("TruthfulQA.csv", _truthfulqa, "truthfulqa"),
    "lambada_openai": Local("lambada_en.jsonl.gz", _lambada, "lambada"),
    "toxigen": Local(
        "toxigen_en.jsonl.gz",
        partial(_labelled, column="label", labels=(0, 1)),
        "toxigen",
        {"doc_to_target": "label"},
    ),
    "enem_2024": Local("enem2024_pt.jsonl.gz", partial(_labelled, column="label", labels=LETTERS)),
    "pira_mcqa": Local(
        "pira_mcqa_en.jsonl.gz", partial(_labelled, column="alternative", labels=LETTERS)
    ),
}
# a file has one split; few-shot examples are other rows of it
ONE_SPLIT = {
    "dataset_path": None,
    "dataset_name": None,
    "training_split": None,
    "validation_split": None,
    "test_split": "test",
    "fewshot_split": "test",
}


def find(folder: Path, file: str) -> Path:
    """A data file in `folder` or in a folder inside it.

    Raises:
        ConfigError: there is none.
    """
    candidates = [folder / file, *sorted(folder.glob(f"*/{file}"))]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise ConfigError(f"data: {folder} has no {file}; name the folder that holds it")
    return path


def read(path: Path, rows: Callable[[Row], Row]) -> Any:
    """The rows of a file as a dataset of the split `test`.

    Raises:
        DataError: a row cannot be read, or lacks a column.
    """
    from datasets import Dataset

    content = []
    for place, row in sources.read(Source(str(path))):
        if isinstance(row, sources.BadRow):
            raise DataError(f"{place}: {row.reason}")
        try:
            content.append(rows(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{place}: is not a row of this task: {why}; mend the row") from error
    return {"test": Dataset.from_list(content)}


def overrides(folder: Path, name: str) -> dict[str, Any]:
    """Entries of a definition that take its rows from a file of `folder`.

    Raises:
        ConfigError: the file is missing.
    """
    task = LOCAL[name]
    path = find(folder, task.file)
    rows = {"custom_dataset": lambda **_: read(path, task.rows)}
    return {"task": name, **ONE_SPLIT, **task.changed, **rows}


def definitions(names: list[str], harness: Path) -> list[Path]:
    """Folders that define these tasks; `harness` is that of the harness's tasks."""
    own = {LOCAL[name].harness for name in names}
    return [TASKS if folder is None else harness / folder for folder in own]
