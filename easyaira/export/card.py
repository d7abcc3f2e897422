"""Model card: the README.md of a released folder, written from the run's records.

Every claim comes from config.yaml, metrics.jsonl, data_report.json, emissions.csv or
export_report.json. Unset facts, such as a licence, are reported as unknown. User-supplied names and
texts are escaped, so that they cannot end the front matter, a table or a code block.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from easyaira.data import report as data_report
from easyaira.errors import StorageError
from easyaira.export.usage import ASKED, JUDGED, KINDS
from easyaira.files import read_json, read_yaml, reason
from easyaira.train import energy, log

PAPERS = {
    "dpo": "Rafailov et al. (2023), Direct Preference Optimization, arXiv:2305.18290",
    "reward": "Ouyang et al. (2022), Training language models to follow instructions with human "
    "feedback, arXiv:2203.02155 (the pairwise loss)",
    "lora": "Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models, "
    "arXiv:2106.09685",
    "reverse": "Li et al. (2023), Self-Alignment with Instruction Backtranslation, "
    "arXiv:2308.06259",
}
UNKNOWN = "not stated"
WRITTEN_AGAIN = "; run the training command again, which writes it anew"


UNPROVEN = {"tensors": {}, "read_back": "", "logits": {"compared": False, "why": ""}}


def of_run(folder: Path, proof: Mapping[str, Any] = UNPROVEN, *, step: int) -> str:
    """Card of a run; without a proof, a check that its records suffice.

    Args:
        folder: the run folder.
        proof: content of export_report.json.
        step: the checkpoint's; later metrics are of other weights.

    Raises:
        StorageError: the run's records are damaged.
    """
    try:
        return _of_run(folder, proof, step)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise StorageError(
            f"{folder}: config.yaml, {data_report.FILES[0]} or metrics.jsonl is damaged "
            f"({type(error).__name__}: {reason(error)}){WRITTEN_AGAIN}"
        ) from error


def _of_run(folder: Path, proof: Mapping[str, Any], step: int) -> str:
    config = read_yaml(folder / "config.yaml", error=StorageError)
    rows = [row for row in log.read(folder / "metrics.jsonl") if row["step"] <= step]
    data = read_json(folder / data_report.FILES[0], error=StorageError, hint=WRITTEN_AGAIN)
    used = energy.used(folder)
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    logged = last.get("step", 0)
    if logged < step:  # the weights were trained beyond the last row
        known = {"attention", "epoch"} if logged else {"attention"}
        last = {name: value for name, value in last.items() if name in known} | {"step": step}
        if "epoch" in last:
            last["epoch"] *= step / logged
    algorithm = next(name for name in ("dpo", "reward", "sft") if name in config)
    stated = {"license": None, "data_licenses": {}, "language": []} | (config.get("card") or {})
    results = _results(rows, algorithm)
    kind = "reward" if algorithm == "reward" else "chat"
    if any("lora_" in name for name in proof["tensors"]):
        kind = {"chat": "adapter", "reward": "adapter, reward"}[kind]
    library, task, usage = KINDS[kind]
    judged = "text" if data["recipe"]["task"] == "label" else "answer"
    judged += ", encoder" if judged == "answer" and data["template"] == "encoder" else ""
    front = {
        "license": stated["license"] or "unknown",
        **{key: stated.get(key) for key in ("license_name", "license_link")},
        "language": stated["language"],
        "library_name": library,
        "pipeline_tag": task,
        "base_model": config["provenance"].get("base_model"),
        "datasets": [name for name, hub, _ in _sources(config) if hub],
        "metrics": [name for name in ("perplexity", "accuracy") if any(name in r for r in results)],
        "tags": ["easyaira", algorithm, *(["lora"] if config.get("lora") else [])],
        "widget": [{"text": text} for text in stated.get("widget", [])],
        "inference": {"parameters": stated["inference"]} if stated.get("inference") else None,
        "co2_eq_emissions": used and _emissions(used, config),
    }
    text = [
        f"# {escape(folder.resolve().name)}",
        _summary(config, algorithm),
        "## Details",
        _table(("", ""), _details(config, algorithm, last, data, used, proof).items()),
        "## Evaluation",
        _evaluation(results, data, _measured(rows), step),
        "## Usage",
        usage.replace("{inputs}", JUDGED[judged]).replace(*ASKED[config["data"]["reverse"]]),
        "## Limitations",
        "\n".join(f"- {line}" for line in _limitations(config, last, data, results)),
        "## How the weights were verified",
        _verified(proof),
        "## Licences",
        _table(("", "licence"), _licences(config, stated)),
        "## Citation",
        _citation(config, algorithm),
    ]
    return _document(front, text)


def of_conversion(source: str, proof: Mapping[str, Any]) -> str:
    """Card of a model that was converted without training."""
    front = {"library_name": "transformers", "tags": ["easyaira"]}
    text = [
        "# Converted model",
        f"Converted from {escape(source)} by EasyAira, without training. The licence and the "
        "card of the original apply.",
        "## How the weights were verified",
        _verified(proof),
    ]
    return _document(front, text)


def escape(value: Any) -> str:
    """Escape user text to one line that Markdown displays verbatim."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", html.escape(line, quote=False))


def _document(front: Mapping[str, Any], text: list[str]) -> str:
    known = {key: value for key, value in front.items() if value not in (None, [], {})}
    head = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(text) + "\n"


def _table(head: tuple[str, ...], rows: Any) -> str:
    """Format a table; cells must already be Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _sources(config: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """Name, whether it is on the hub, and split of each data source.

    A local source is named by its file alone, since its folder is private."""
    train = config["data"]["train"]
    if isinstance(train, str):
        train = [{"path": train, "split": config["data"]["split"]}]
    sources = []
    for path, split in ((source["path"], source["split"]) for source in train):
        on_hub = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).exists()
        sources.append((path if on_hub else Path(path).name, on_hub, split))
    return sources


def _start(config: Mapping[str, Any]) -> str:
    """The initial model, by its hub id or the name of its folder."""
    made, name = config["provenance"], config["model"]["name_or_path"]
    if made.get("model_commit"):
        return f"{escape(name)} at commit {escape(made['model_commit'])}"
    base = made.get("base_model")
    return escape(Path(name).name) + (f", derived from {escape(base)}" if base else "")


def _summary(config: Mapping[str, Any], algorithm: str) -> str:
    how = {
        "sft": "fine-tuned with supervision",
        "dpo": "trained on preferences with DPO",
        "reward": "trained to score answers",
    }[algorithm]
    if config["data"]["reverse"]:
        how += " to write the instruction that a text answers"
    if config["model"]["init"] == "random":
        how = f"initialised with random weights, {how}"
    names = ", ".join(escape(name) for name, *_ in _sources(config))
    return (
        f"{_start(config)}, {how} on {names}, by EasyAira. This card was generated from the run's "
        "records."
    )


def _details(
    config: Mapping[str, Any],
    algorithm: str,
    last: Mapping[str, Any],
    data: Mapping[str, Any],
    used: energy.Used | None,
    proof: Mapping[str, Any],
) -> dict[str, str]:
    made, optimizer, train = config["provenance"], config["optimizer"], data["train"]
    devices, sources = made["devices"], _sources(config)
    unit = "examples" if algorithm == "sft" else "pairs"
    rows = {
        "Size": f"{made['parameters']:,} parameters",
        "Context": f"{made['positions']:,} tokens" if "positions" in made else None,
        "Starting model": _start(config),
        "Data": ", ".join(f"{escape(name)}, split {escape(split)}" for name, _, split in sources),
        "Rows": f"{train['examples']:,} {unit} trained on, of {train['read']:,} rows read"
        + (f"; {data['held out']['examples']:,} held out" if "held out" in data else "")
        + "".join(f"; {count:,} dropped: {escape(why)}" for why, count in train["dropped"].items()),
        "Epochs": _number(last["epoch"]) if "epoch" in last else None,
        "Updates": f"{last['step']:,}" if "step" in last else None,
        "Batch size": f"{config['train_batch_size']} {unit} per update"
        + (
            f", in {config['gradient_accumulation_steps']} accumulation steps"
            if config["gradient_accumulation_steps"] > 1
            else ""
        ),
        "Tokens": f"{last['num_tokens']:,}, without padding" if "num_tokens" in last else None,
        "Longest example": f"{train['length']['longest']:,} tokens",
        "Objective": f"{algorithm}: {_options(config[algorithm])}",
        "Optimizer": f"AdamW, betas {optimizer['adam_beta1']} and {optimizer['adam_beta2']}, "
        f"epsilon {optimizer['adam_epsilon']}, weight decay {optimizer['weight_decay']} "
        "(not on norms and biases), "
        + (
            f"gradients clipped to norm {optimizer['max_grad_norm']}"
            if optimizer["max_grad_norm"]
            else "gradients not clipped"
        ),
        "Learning rate": f"{optimizer['learning_rate']}, {optimizer['lr_scheduler_type']}, after "
        f"{made['warmup_steps']:,} warm-up updates",
        "Dropout": str(config["model"]["dropout"]),
        "Adapter": f"LoRA: {_options(config['lora'])}{_trained(proof)}" if config["lora"] else None,
        "Precision": f"{made['compute']} computation, " + _precision(config["lora"]),
        "Attention": escape(last["attention"]) if "attention" in last else None,
        "Seed": str(config["seed"]),
        "Hardware": f"{devices['count']} x {escape(devices['kind'])}"
        + (f", {devices['processes']} processes" if devices["processes"] > 1 else ""),
        "Energy": _energy(used) if used else "not tracked",
        "Software": ", ".join(f"{name} {escape(v)}" for name, v in made["versions"].items()),
        "Fingerprint of the data": escape(made["data_fingerprint"]),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _precision(lora: Mapping[str, Any] | None) -> str:
    if lora is None:
        return "float32 weights and optimizer"
    held = f", frozen linear layers held in {lora['quantize']}" if lora.get("quantize") else ""
    return f"float32 adapters and optimizer{held}"


def _trained(proof: Mapping[str, Any]) -> str:
    """Number of trained parameters, if the export is an adapter."""
    if not any("lora_" in name for name in proof["tensors"]):
        return ""
    trained = sum(math.prod(tensor["shape"]) for tensor in proof["tensors"].values())
    return f"; {trained:,} trained parameters"


def _options(group: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return {True: "yes", False: "no", None: "none"}[value]
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(f"{escape(name)} {escape(shown(value))}" for name, value in group.items())


def _emissions(used: energy.Used, config: Mapping[str, Any]) -> dict[str, Any]:
    """Emission fields of the hub's front matter; emissions in grams."""
    devices = config["provenance"]["devices"]
    return {
        "emissions": float(f"{used.co2_kg * 1000:.4g}"),
        "source": "CodeCarbon: " + " / ".join(used.sources),
        "training_type": "pre-training" if config["model"]["init"] == "random" else "fine-tuning",
        "geographical_location": used.place,
        "hardware_used": f"{devices['count']} x {devices['kind']}",
    }


def _energy(used: energy.Used) -> str:
    lost = f"; {used.lost} sessions were killed and are not included" if used.lost else ""
    return (
        f"{used.kwh:.4g} kWh and {used.co2_kg:.4g} kg of CO2 equivalent in {escape(used.place)}, "
        f"over {used.seconds:,.0f} seconds{lost}. CodeCarbon: " + escape(" / ".join(used.sources))
    )


def _results(rows: list[Mapping[str, Any]], algorithm: str) -> dict[str, tuple[str, str]]:
    """Map from held-out metric to its values before and after training."""
    held_out = [row for row in rows if any(name.startswith("eval_") for name in row)]
    if not held_out:
        return {}
    first, final = held_out[0], held_out[-1]
    results = {}
    for name in final:
        if not name.startswith("eval_"):
            continue
        values = [first.get(name) if first["step"] == 0 else None, final[name]]
        results[name.removeprefix("eval_")] = values
        if algorithm == "sft" and name == "eval_loss":
            results["perplexity"] = [value and math.exp(min(value, 700)) for value in values]
    return {
        name: tuple("-" if value is None else _number(value) for value in values)
        for name, values in results.items()
    }


def _measured(rows: list[Mapping[str, Any]]) -> int | None:
    """The last step with held-out metrics."""
    steps = [row["step"] for row in rows if any(name.startswith("eval_") for name in row)]
    return max(steps, default=None)


def _evaluation(
    results: Mapping[str, tuple[str, str]], data: Mapping[str, Any], measured: int | None, step: int
) -> str:
    if not results:
        return "No rows were held out, so only the training loss was measured."
    held_out = data["held out"]["examples"]
    after = "after" if measured == step else f"after {measured:,} of {step:,} updates"
    table = _table(
        ("metric", "before training", after),
        [(escape(name), *values) for name, values in results.items()],
    )
    return f"On {held_out:,} rows that were not trained on:\n\n{table}"


def _limitations(
    config: Mapping[str, Any],
    last: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
) -> list[str]:
    """Limitations that follow from the records or from what they lack."""
    options, train = config["data"], data["train"]
    limits = [
        "This run did not measure truthfulness, toxicity, bias or benchmark performance. This "
        "model may inherit problems of the initial model and of the data.",
        f"No training example was longer than {train['length']['longest']:,} tokens; longer inputs "
        "are untested.",
    ]
    if cut := {why: n for why, n in train["noted"].items() if "cut" in why or "truncat" in why}:
        cuts = ", ".join(f"{count:,} {escape(why)}" for why, count in cut.items())
        limits.append(f"Some examples were truncated: {cuts}.")
    if isinstance(options["eval"], float) and results:
        limits.append(
            "The held-out rows were split off from the training data by prompt, so the figures "
            "say little about other data."
        )
    if (epochs := last.get("epoch")) is not None and epochs < 1:
        limits.append(f"Training saw {100 * epochs:.3g} % of the data.")
    if options["compat"]:
        limits.append("The loss includes prompts and padding, as in an older script.")
    if "reward" in config:
        limits.append("Scores have no unit: compare only those of answers to the same prompt.")
    return limits


def _verified(proof: Mapping[str, Any]) -> str:
    logits = proof["logits"]
    if logits["compared"]:
        compared = (
            "The folder was loaded in PyTorch and its outputs on fixed prompts were compared with "
            f"EasyAira's, both in float32: the largest difference is "
            f"{logits['max_difference']:.2g}, for outputs up to {logits['largest_logit']:.3g}."
        )
    else:
        compared = f"Outputs in PyTorch were not compared: {escape(logits['why'])}."
    return (
        f"The files were read back: {escape(proof['read_back'])}. {compared} "
        "`export_report.json` lists the SHA-256 of every tensor."
    )


def _licences(config: Mapping[str, Any], stated: Mapping[str, Any]) -> list[tuple[str, str]]:
    name = stated.get("license_name") or stated["license"] or UNKNOWN
    rows = [
        ("this model", escape(name)),
        (_start(config), escape(stated.get("base_license") or UNKNOWN)),
    ]
    for source, *_ in _sources(config):
        rows.append((escape(source), escape(stated["data_licenses"].get(source, UNKNOWN))))
    return rows


def _citation(config: Mapping[str, Any], algorithm: str) -> str:
    used = [algorithm, *(["lora"] if config["lora"] else [])]
    used += ["reverse"] if config["data"]["reverse"] else []
    made = config["provenance"]
    commit = f", commit {made['git_commit']}" if made["git_commit"] else ""
    lines = [f"EasyAira {escape(made['versions']['easyaira'])}{escape(commit)}", _start(config)]
    return "\n".join(f"- {line}" for line in [*lines, *(PAPERS[n] for n in used if n in PAPERS)])
