"""The data of a run: sources, the template, and which tokens of a row are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from easyaira.translation.recipe import Recipe, evaluated

FIRST_LINE = 2**20  # longest first row that is looked at
CONVERSATION = ("messages", "conversations")
TEXTS = "a control token in a row of plain text stays text; data.allowed_tokens makes it a token"


def columns_of(path: str) -> dict[str, Any] | None:
    """The first row of a .jsonl file of this machine, or of a folder of such; else None."""
    file = Path(path)
    if file.is_dir():
        file = min(file.glob("*train*.jsonl"), default=min(file.glob("*.jsonl"), default=file))
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    with file.open("rb") as lines:
        try:
            row = json.loads(lines.readline(FIRST_LINE))
        except ValueError:
            return None
    return row if isinstance(row, dict) else None


def source(entry: dict[str, Any]) -> dict[str, Any]:
    """A source of ours, without values that are defaults."""
    if entry.get("subset") == "default":
        entry = entry | {"subset": None}
    return {key: value for key, value in entry.items() if value not in (None, 1.0, "train")}


def mixture(run: Recipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sources to train on, and those to hold out."""
    if run.get("sources"):
        return run.get("sources"), run.get("held_out", [])
    splits = run.get("dataset_splits", [])
    train, test = run.get("dataset_train_split", "train"), run.get("dataset_test_split", "test")
    streaming = run.get("dataset_streaming") or None
    mixer = run.get("dataset_mixer")
    if isinstance(mixer, dict) and mixer:  # name: share of its rows
        held_out = [split for split in splits if "test" in split]
        names = [split for split in splits if "test" not in split] or [train]
        configs = run.get("dataset_configs") or [None] * len(mixer)
        if len(configs) != len(mixer):
            run.refuse("dataset_configs", f"names {len(configs)} for {len(mixer)} data sets")
        pairs = list(zip(mixer.items(), configs, strict=False))
        used = [
            source({"path": path, "split": split, "weight": share, "subset": config})
            for (path, share), config in pairs
            for split in names
        ]  # fmt: skip
        return used, [
            {"path": path, "split": split} for path in mixer for split in held_out or [test]
        ]
    if mixed := run.get("dataset_mixture") or run.get("datasets"):
        if run.get("dataset_mixture"):
            run.facts["test_split_size"] = mixed.get("test_split_size")
            mixed = mixed.get("datasets", [])
        return [
            source({
                "path": entry.get("id") or entry.get("path") or entry.get("data_files"),
                "split": entry.get("split"),
                "subset": entry.get("config") or entry.get("name"),
                "weight": entry.get("weight"),
                "streaming": streaming,
            })
            for entry in mixed
        ], []  # fmt: skip
    if not (path := run.get("dataset_name")):
        return [], []
    common = {"path": path, "streaming": streaming, "subset": run.get("dataset_config")}
    used = [source(common | {"split": train})]
    return used, [source(common | {"split": test})]


def data(run: Recipe) -> None:
    used, held_out = mixture(run)
    if not used:
        return run.refuse("dataset_name", "names no data; add it to the file")
    if (field := run.get("dataset_text_field", "text")) != "text":
        used = [{**entry, "columns": {"text": field}} for entry in used]
        held_out = [{**entry, "columns": {"text": field}} for entry in held_out]
    run.options["data.train"] = used
    if any(entry.get("weight", 1) != 1 for entry in used):
        run.note("of a weighted source, other rows are drawn (weight)")
    if size := run.get("test_split_size"):
        run.options["data.eval"] = size if size < 1 else int(size)  # rows there, prompts here
    elif evaluated(run) and held_out:
        run.options["data.eval"] = held_out
    row = columns_of(used[0].get("path", ""))
    texts = run.task == "sft" and _of_texts(run, row)
    _packing(run, texts)
    if texts:
        return _texts(run)
    _form(run, row)


def _packing(run: Recipe, texts: bool) -> None:
    """How examples fill rows: apart from each other, or joined and cut."""
    if run.get("packing") and run.get("packing_strategy") == "wrapped":
        if not texts:
            return run.refuse("packing_strategy", "only rows of plain text are joined and cut here")
        run.options |= {"data.texts": "join", "sft.completion_only_loss": False}
        run.note("the last example of joined texts, and of each data set, is shorter than others")
    elif run.get("packing") and run.options.get("data.texts") != "join":
        run.note(
            "packing: train_batch_size counts examples, and not rows of packed examples, so there "
            "are more and smaller updates: raise it by the examples that fill a row"
        )


def _of_texts(run: Recipe, row: dict[str, Any] | None) -> bool:
    """Whether the rows are plain text: the file says so, or the first row, or a name of its own for
    the column."""
    if "texts" in run.facts:
        return run.facts["texts"]
    field = run.get("dataset_text_field", "text")
    if row is None:
        return field != "text"
    return field in row and not {"prompt", "completion", *CONVERSATION} & row.keys()


def _texts(run: Recipe) -> None:
    """Rows that are learned whole, whatever the template."""
    run.options["data.template"] = run.get("chat_template", "plain")
    run.facts["has_texts"] = True
    run.note(TEXTS)
    if run.options["data.template"] == "plain":
        run.note(
            "data.template plain is what the release holds; chat keeps a template that the "
            "tokenizer has"
        )
    if run.options.get("data.truncation") == "keep_end" and "data.texts" not in run.options:
        run.refuse("truncation_mode", "keep_end drops a long text here, and keeps its end there")


def _form(run: Recipe, row: dict[str, Any] | None) -> None:
    """Choose the template and what is learned by the columns of the rows."""
    spoken = row is None or any(isinstance(value, list) for value in row.values())
    template = run.get("chat_template")
    if template and not spoken and not run.get("sources"):
        run.note("chat_template is not used for rows of text, in TRL either")
        template = None
    run.options["data.template"] = template or ("chat" if spoken else "plain")
    own = any("template" in entry for entry in run.options["data.train"])
    if row is None and not template and not own:
        run.note(
            "data.template chat: the rows were not looked at, and are taken for messages; rows of "
            "plain text need plain"
        )
    if run.task != "sft":
        return
    if row is None and run.get("dataset_text_field"):
        run.note(TEXTS)
    pairs = row is not None and "completion" in row
    asked = run.get("completion_only_loss")
    only = pairs if asked is None else asked
    answers = bool(run.get("assistant_only_loss"))
    run.options["sft.completion_only_loss"] = bool(only or answers)
    run.options["sft.assistant_only_loss"] = answers or pairs
    if row is None and asked is None and not answers:
        run.note(
            "loss on every token, as TRL puts it on rows of messages; on prompt and completion it "
            "puts it on the completion (sft.completion_only_loss true)"
        )
    if row and "texts" not in run.facts and not {"completion", *CONVERSATION} & row.keys():
        run.refuse("dataset_name", f"{' and '.join(row)} are no form of rows for SFT")
