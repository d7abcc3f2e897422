"""Model card: the README.md of a released folder, written from the run's records.

Every claim comes from config.yaml, metrics.jsonl, data_report.json, evaluation/, emissions.csv or
export_report.json. Unset facts, such as a licence, are reported as unknown. User-supplied names and
texts are escaped, so that they cannot end the front matter, a table or a code block. The words are
in card.md.jinja.
"""

from __future__ import annotations

import html
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from easyaira.config import dpo, rl
from easyaira.config.run import PROVENANCE
from easyaira.evaluation.results import Result, average
from easyaira.export.records import Records
from easyaira.export.usage import usage
from easyaira.train import energy

logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # `stated` finds no figures
TEMPLATE = Path(__file__).with_name("card.md.jinja")

PAPERS = {
    "dpo": "Rafailov et al. (2023), Direct Preference Optimization, arXiv:2305.18290",
    "reward": "Ouyang et al. (2022), Training language models to follow instructions with human "
    "feedback, arXiv:2203.02155 (the pairwise loss)",
    "grpo": "Shao et al. (2024), DeepSeekMath, arXiv:2402.03300 (GRPO)",
    "rloo": "Ahmadian et al. (2024), Back to Basics: Revisiting REINFORCE Style Optimization for "
    "Learning from Human Feedback in LLMs, arXiv:2402.14740",
    "online_dpo": "Guo et al. (2024), Direct Language Model Alignment from Online AI Feedback, "
    "arXiv:2402.04792",
    "ppo": "Schulman et al. (2017), Proximal Policy Optimization Algorithms, arXiv:1707.06347",
    "lora": "Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models, "
    "arXiv:2106.09685",
    "reverse": "Li et al. (2023), Self-Alignment with Instruction Backtranslation, "
    "arXiv:2308.06259",
}
UNKNOWN = "not stated"


# What `stated` reads back: sections with figures, and entries of the front matter
FIGURES = ("Details", "Evaluation", "Limitations", "How the weights were verified")
FRONT = ("base_model", "co2_eq_emissions", "datasets", "metrics", "model-index")


def text(records: Records, report: Mapping[str, Any], first: str = "") -> str:
    """Content of README.md.

    Args:
        report: content of export_report.json.
        first: Markdown that says what must be done before the usage works.
    """
    logits = report["logits"]
    shown = {
        "trained": records.trained,
        "read_back": escape(report["read_back"]),
        "logits": logits,
        "why_not": escape(logits.get("why", "")),
        "first": first,
    }
    if records.trained:
        front, facts = _of_run(records, report)
    else:
        front = {"library_name": "transformers", "tags": ["easyaira"]}
        facts = {"title": "Converted model", "start": escape(records.folder.name)}
    data = ModelCardData(**{k: v for k, v in front.items() if v not in (None, [], {})})
    card = ModelCard.from_template(data, str(TEMPLATE), **shown, **facts)
    return card.content + "\n"


def stated(content: str) -> dict[str, Any]:
    """The figures of a card, as proof.json holds them: entries of its front matter, and lines of
    its sections.

    Raises:
        ValueError: the front matter is no YAML.
    """
    card = ModelCard(content)
    front = card.data.to_dict()
    lines: dict[str, list[str]] = {name: [] for name in FIGURES}
    heading = ""
    for line in card.text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").rstrip()
        elif heading in lines and line.strip():
            lines[heading].append(line.rstrip())
    return {"front": {key: front[key] for key in FRONT if key in front}, "sections": lines}


def _of_run(records: Records, report: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Front matter and template variables of a run's card."""
    config, data, used, last = records.config, records.data, records.energy, records.last
    algorithm, train = records.algorithm, (data or {}).get("train")
    settings = {"license": None, "data_licenses": {}, "language": []} | (config.get("card") or {})
    results, (_, final) = _results(records), records.held_out
    title = settings.get("title") or records.folder.resolve().name
    adapter = any("lora_" in name for name in report["tensors"])
    kind = ("adapter, " if adapter else "") + ("reward" if algorithm == "reward" else "chat")
    judged = "answer"
    if data and data["recipe"]["task"] == "label":
        judged = "text"
    elif data and data["template"] == "encoder":
        judged = "answer, encoder"
    library, task, code = usage(kind, judged, config["data"]["reverse"], settings["language"])
    epochs = last.get("epoch")
    cut = (
        {why: n for why, n in train["noted"].items() if "cut" in why or "truncat" in why}
        if train
        else {}
    )
    front = {
        "license": settings["license"] or "unknown",
        **{key: settings.get(key) for key in ("license_name", "license_link")},
        "language": settings["language"],
        "library_name": library,
        "pipeline_tag": task,
        "base_model": config[PROVENANCE].get("base_model"),
        "datasets": [name for name, hub, _ in records.sources() if hub],
        "metrics": [name for name in ("perplexity", "accuracy") if any(name in r for r in results)],
        "tags": ["easyaira", algorithm, *(["lora"] if config.get("lora") else [])],
        "widget": [{"text": text} for text in settings.get("widget", [])],
        "inference": {"parameters": settings["inference"]} if settings.get("inference") else None,
        "co2_eq_emissions": used and _emissions(used, config),
    }
    if records.evaluations:
        front["model_name"] = title
        front["eval_results"] = [_for_hub(result, task) for result in records.evaluations]
    return front, {
        "title": escape(title),
        "start": _start(config),
        "random_start": config["model"]["init"] == "random",
        "algorithm": algorithm,
        "reverse": config["data"]["reverse"],
        "sources": [escape(name) for name, *_ in records.sources()],
        "details": _details(records, report),
        "metrics_end": records.metrics_end,
        "updates": f"{records.step:,}",
        "results": [(escape(name), *values) for name, values in results.items()],
        "after": "after" if final.get("step") == records.step else f"at update {final.get('step')}",
        "evaluations": [
            (escape(one.label), escape(one.metric), one.shown, f"{one.examples:,}")
            for one in records.evaluations
        ],
        "average": average(records.evaluations),
        "held_out": f"{data['held out']['examples']:,}" if data and results else "the",
        "usage": code,
        "longest": f"{train['length']['longest']:,}" if train else None,
        "cut": [f"{count:,} {escape(why)}" for why, count in cut.items()],
        "split_off": isinstance(config["data"]["eval"], float),
        "seen": f"{100 * epochs:.3g}" if epochs is not None and epochs < 1 else None,
        "compat": config["data"]["compat"],
        "licences": _licences(records, settings),
        "citation": _citation(config, algorithm),
    }


def _for_hub(result: Result, task: str) -> EvalResult:
    """A result as the hub's `model-index` has it; shares in percent."""
    value = 100 * result.value if result.is_share else result.value
    return EvalResult(
        task_type=task,
        dataset_type=result.data,
        dataset_name=result.label,
        dataset_config=result.label,  # the hub merges results of one type and configuration
        metric_type=result.metric,
        metric_value=float(f"{value:.6g}"),
    )


def escape(value: Any) -> str:
    """Escape user text to one line that Markdown displays verbatim."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", html.escape(line, quote=False))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _start(config: Mapping[str, Any]) -> str:
    """The initial model, by its hub id or the name of its folder."""
    made, name = config[PROVENANCE], config["model"]["name_or_path"]
    if made.get("model_commit"):
        return f"{escape(name)} at commit {escape(made['model_commit'])}"
    base = made.get("base_model")
    return escape(Path(name).name) + (f", derived from {escape(base)}" if base else "")


def _details(records: Records, report: Mapping[str, Any]) -> dict[str, str]:
    config, last, used = records.config, records.last, records.energy
    algorithm, made, optimizer = records.algorithm, config[PROVENANCE], config["optimizer"]
    devices, data = made["devices"], records.data
    train = data["train"] if data else None
    unit = {"sft": "examples", "rl": "answers"}.get(algorithm, "pairs")
    rows = {
        "Size": f"{made['parameters']:,} parameters",
        "Context": f"{made['positions']:,} tokens" if "positions" in made else None,
        "Starting model": _start(config),
        "Data": ", ".join(
            f"{escape(name)}, split {escape(split)}" for name, _, split in records.sources()
        ),
        "Rows": _rows(data, "prompts" if algorithm == "rl" else unit) if data else None,
        "Epochs": _number(last["epoch"]) if "epoch" in last else None,
        "Updates": f"{records.step:,}",
        "Batch size": f"{config['train_batch_size']} {unit} per update"
        + (
            f", in {config['gradient_accumulation_steps']} accumulation steps"
            if config["gradient_accumulation_steps"] > 1
            else ""
        ),
        "Tokens": f"{last['num_tokens']:,}, without padding" if "num_tokens" in last else None,
        "Longest example": f"{train['length']['longest']:,} tokens" if train else None,
        "Objective": f"{algorithm}: {_options(_applying(algorithm, config[algorithm]))}",
        "Optimizer": f"{_algorithm(optimizer)}, "
        f"betas {optimizer['adam_beta1']} and {optimizer['adam_beta2']}, "
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
        "Adapter": f"LoRA: {_options(config['lora'])}{_trained(report)}"
        if config["lora"]
        else None,
        "Precision": f"{made['compute']} computation, "
        + _precision(config["lora"], optimizer.get("state_dtype", "float32")),
        "Attention": escape(last["attention"]) if "attention" in last else None,
        "Seed": str(config["seed"]),
        "Hardware": f"{devices['count']} x {escape(devices['kind'])}"
        + (f", {devices['processes']} processes" if devices["processes"] > 1 else ""),
        "Energy": _energy(used) if used else "not tracked",
        "Software": ", ".join(f"{name} {escape(v)}" for name, v in made["versions"].items()),
        "Fingerprint of the data": escape(made["data_fingerprint"]),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _algorithm(optimizer: Mapping[str, Any]) -> str:
    if optimizer.get("name", "adamw") == "muon":
        return "Muon for the matrices of layers, for the rest AdamW"
    return "AdamW"


def _precision(lora: Mapping[str, Any] | None, state: str) -> str:
    trained = "weights" if lora is None else "adapters"
    both = f"float32 {trained} and optimizer"
    if state == "8bit":
        both = f"float32 {trained}, 8-bit state of the optimizer"
    quantize = (lora or {}).get("quantize")
    return both + (f", frozen linear layers held in {quantize}" if quantize else "")


def _rows(data: Mapping[str, Any], unit: str) -> str:
    train = data["train"]
    held_out = f"; {data['held out']['examples']:,} held out" if "held out" in data else ""
    dropped = (f"; {count:,} dropped: {escape(why)}" for why, count in train["dropped"].items())
    return (
        f"{train['examples']:,} {unit} trained on, of {train['read']:,} rows read{held_out}"
        + "".join(dropped)
    )


def _trained(report: Mapping[str, Any]) -> str:
    """Number of trained parameters, if the export is an adapter."""
    if not any("lora_" in name for name in report["tensors"]):
        return ""
    sizes = {  # a tied head is stored beside the embedding
        name if "lora_" in name else tensor["sha256"]: math.prod(tensor["shape"])
        for name, tensor in report["tensors"].items()
    }
    trained = sum(sizes.values())
    return f"; {trained:,} trained parameters"


def _applying(algorithm: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an algorithm without those that apply only to other losses or algorithms."""
    of = {"dpo": dpo.others_only, "rl": rl.others_only}.get(algorithm)
    others = of(group) if of else {}
    return {name: value for name, value in group.items() if name not in others}


def _options(group: Mapping[str, Any]) -> str:
    """The options that are set."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    held = {name: shown(value) for name, value in group.items() if value is not None}
    return ", ".join(f"{escape(name)} {escape(value)}" for name, value in held.items())


def _emissions(used: energy.Used, config: Mapping[str, Any]) -> dict[str, Any]:
    """Emission fields of the hub's front matter; emissions in grams."""
    devices = config[PROVENANCE]["devices"]
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


def _results(records: Records) -> dict[str, tuple[str, str]]:
    """Map from held-out metric to its values before training and now."""
    first, final = records.held_out
    results = {}
    for name in final:
        if not name.startswith("eval_"):
            continue
        values = [first.get(name), final[name]]
        results[name.removeprefix("eval_")] = values
        if records.algorithm == "sft" and name == "eval_loss":
            results["perplexity"] = [value and math.exp(min(value, 700)) for value in values]
    return {
        name: tuple("-" if value is None else _number(value) for value in values)
        for name, values in results.items()
    }


def _licences(records: Records, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    name = settings.get("license_name") or settings["license"] or UNKNOWN
    rows = [
        ("this model", escape(name)),
        (_start(records.config), escape(settings.get("base_license") or UNKNOWN)),
    ]
    for source, *_ in records.sources():
        rows.append((escape(source), escape(settings["data_licenses"].get(source, UNKNOWN))))
    return rows


def _citation(config: Mapping[str, Any], algorithm: str) -> list[str]:
    used = [algorithm, *(["lora"] if config["lora"] else [])]
    used += ["reverse"] if config["data"]["reverse"] else []
    used += [config["rl"]["algorithm"]] if algorithm == "rl" else []
    made = config[PROVENANCE]
    commit = f", commit {made['git_commit']}" if made["git_commit"] else ""
    lines = [f"EasyAira {escape(made['versions']['easyaira'])}{escape(commit)}", _start(config)]
    return [*lines, *(PAPERS[name] for name in used if name in PAPERS)]
