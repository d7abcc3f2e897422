"""The README.md of a released folder: what was trained, on what, and with what result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from easyaira import metrics

USAGE = """```python
from transformers import pipeline

chat = pipeline("text-generation", "FOLDER")
print(chat([{"role": "user", "content": "Hello!"}], do_sample=False))
```"""

SCORER_USAGE = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
TEXT
print(model(**inputs).logits[0, 0].item())  # the higher, the better
```"""
SCORED_TEXT = {  # what a scorer is given, by what it was trained on
    "text": """inputs = tokenizer("You are welcome.", truncation=True, return_tensors="pt")""",
    "pair, encoder": """text = "How are you?" + tokenizer.sep_token + "Fine, thank you."
inputs = tokenizer(text, truncation=True, return_tensors="pt")""",
    "pair": """messages = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine, thank you."},
]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")""",
}


def _usage(folder: Path, algorithm: str) -> str:
    if algorithm != "reward":
        return USAGE
    data = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    kind = "text" if data["recipe"]["task"] == "label" else "pair"
    kind += ", encoder" if kind == "pair" and data["template"] == "encoder" else ""
    return SCORER_USAGE.replace("TEXT", SCORED_TEXT[kind])


def of_run(folder: Path) -> str:
    """The card of a run, from its config.yaml and metrics.jsonl."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    rows = metrics.read(folder / "metrics.jsonl")
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    made = config["provenance"]
    optimizer = config["optimizer"]
    algorithm = next(name for name in ("dpo", "reward", "sft") if name in config)
    facts = {
        "Parameters": f"{made['parameters']:,}",
        "Start": config["model"]["name_or_path"],
        "Algorithm": f"{algorithm}: {config[algorithm]}",
        "Data": _named(config["data"]["train"]),
        "Updates": f"{last.get('step')} of {config['train_batch_size']} examples",
        "Tokens": f"{last['num_tokens']:,}" if "num_tokens" in last else None,
        "Optimizer": f"AdamW, {optimizer}",
        "Hardware": f"{made['devices']['count']} x {made['devices']['kind']}",
        "Software": ", ".join(f"{k} {v}" for k, v in made["versions"].items()),
    }
    results = {n: v for n, v in last.items() if n.startswith("eval_") and isinstance(v, float)}
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if algorithm == "reward" else "text-generation",
        "base_model": config["model"]["name_or_path"],
        "tags": ["easyaira", algorithm],
    }
    parts = [
        f"# {folder.name}",
        "## Training",
        _table("", "", facts),
        *(["## Held-out results", _table("metric", "value", results)] if results else []),
        "## Usage",
        _usage(folder, algorithm),
        "The licences of the starting model and of the data apply to this model.",
    ]
    return _with_front_matter(front, parts)


def of_conversion(source: str) -> str:
    """The card of a model that was only converted."""
    front = {"library_name": "transformers", "tags": ["easyaira"]}
    return _with_front_matter(front, ["# Converted model", f"Converted from `{_line(source)}`."])


def _with_front_matter(front: Mapping[str, Any], parts: list[str]) -> str:
    return "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n\n" + "\n\n".join(parts) + "\n"


def _named(source: Any) -> str:
    return source if isinstance(source, str) else ", ".join(part["path"] for part in source)


def _line(value: Any) -> str:
    """One line of text that cannot end a table cell or a front matter."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    lines += [f"| {name} | {_line(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(lines)
