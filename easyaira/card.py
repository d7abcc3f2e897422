"""The README.md of a released folder: what was trained, on what, and with what result."""

from __future__ import annotations

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


def of_run(folder: Path) -> str:
    """The card of a run, from its config.yaml and metrics.jsonl."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    rows = metrics.read(folder / "metrics.jsonl")
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    made = config["provenance"]
    optimizer = config["optimizer"]
    algorithm = "dpo" if "dpo" in config else "sft"
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
        "pipeline_tag": "text-generation",
        "base_model": config["model"]["name_or_path"],
        "tags": ["easyaira", algorithm],
    }
    parts = [
        f"# {folder.name}",
        "## Training",
        _table("", "", facts),
        *(["## Held-out results", _table("metric", "value", results)] if results else []),
        "## Usage",
        USAGE,
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
