"""Options of ours from the facts of a run, which are named as in transformers.

Each function reads the facts that it names, and writes options, refusals, and notes of what
differs on purpose."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

ADAMW = """adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_apex_fused
    adamw_hf adamw paged_adamw paged_adamw_32bit adamw_anyprecision""".split()
ADAMW_8BIT = "adamw_8bit adamw_bnb_8bit paged_adamw_8bit adamw_torch_8bit adamw_torch_4bit".split()
SCHEDULES = "linear cosine cosine_with_min_lr constant constant_with_warmup inverse_sqrt".split()
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
TABLES = "embed_tokens wte embed_in word_embeddings lm_head".split()  # by Hugging Face's names
SCORE_HEADS = ("score", "classifier")
MIXTRAL = re.compile("mixtral", re.IGNORECASE)  # in names of models
NO = (None, False, "no", "none", "NO")


@dataclass
class Recipe:
    """A run that is being translated.

    Attributes:
        task: sft, dpo or reward.
        devices: number of devices of the run to be translated.
        facts: what its file says, by transformers' names.
        keys: the file's own name of a fact.
        options: dotted names of our options, with their values.
        notes: what differs on purpose.
        refused: key -> why it cannot be translated.
        no_effect: key -> why it changes nothing.
    """

    task: str
    devices: int
    facts: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    no_effect: dict[str, str] = field(default_factory=dict)

    def get(self, fact: str, default: Any = None) -> Any:
        value = self.facts.get(fact)
        return default if value is None else value

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, fact: str, why: str) -> None:
        self.refused[self.keys.get(fact, fact)] = why


def batch(run: Recipe) -> None:
    if "train_batch_size" in run.options:
        return None
    each, steps = run.get("per_device_train_batch_size", 8), run.get("gradient_accumulation_steps")
    if not all(isinstance(number, int) for number in (each, steps or 1)):
        return run.refuse(
            "per_device_train_batch_size", "is not a number; write the number it stands for"
        )
    steps = steps or 1
    total = each * steps * run.devices
    run.options |= {"train_batch_size": total, "gradient_accumulation_steps": steps}
    run.note(
        f"train_batch_size {total} is {each} per device x {steps} accumulation steps x "
        f"{run.devices} device{'s'[: run.devices != 1]} (--devices)"
    )


def schedule(run: Recipe) -> None:
    kind, options = run.get("lr_scheduler_type", "linear"), dict(run.get("lr_scheduler_kwargs", {}))
    if kind not in SCHEDULES:
        return run.refuse("lr_scheduler_type", f"{kind} is none of {', '.join(SCHEDULES)}")
    if (share := run.get("cosine_min_lr_ratio")) and kind == "cosine":
        kind, options = "cosine_with_min_lr", options | {"min_lr_rate": share}
    if kind == "cosine_with_min_lr":
        rate, lowest = run.options.get("optimizer.learning_rate"), options.pop("min_lr", None)
        share = options.pop("min_lr_rate", lowest / rate if rate and lowest else None)
        run.options["optimizer.min_lr_rate"] = share or 0.0
    if options:
        return run.refuse("lr_scheduler_kwargs", f"{min(options)} is no option of {kind} here")
    run.options["optimizer.lr_scheduler_type"] = kind
    steps, ratio = run.get("warmup_steps", 0), run.get("warmup_ratio", 0)
    if 0 < steps < 1:  # transformers 5: a share of all updates
        steps, ratio = 0, steps
    if kind == "constant":
        if steps or ratio:
            run.note("constant has no warm-up, in transformers neither")
        return
    if steps or not ratio:
        run.options["optimizer.warmup_steps"] = int(steps)
    else:
        run.options["optimizer.warmup_ratio"] = ratio


def optimizer(run: Recipe) -> None:
    name = run.get("optim", "adamw")
    if name in ADAMW_8BIT:
        run.options["optimizer.state_dtype"] = "8bit"
        if "4bit" in name:
            run.note(f"the optimizer's state is 8-bit ({run.keys['optim']}: {name})")
    elif name == "muon":
        run.refuse(
            "optim",
            "its updates have another scale; drop it, set optimizer.name to muon in the translated "
            "file, and choose a rate for AdamW",
        )
    elif name not in ADAMW:
        run.refuse("optim", f"{name} is neither AdamW nor Muon")


def precision(run: Recipe) -> None:
    stored = str(run.get("dtype", "float32")).removeprefix("torch.")
    half = run.get("bf16") in (True, "auto", "full") or stored in ("bfloat16", "float16", "half")
    if run.get("fp16") or stored in ("float16", "half") and not run.get("bf16"):
        half = True
        run.note("float16 becomes bfloat16, which needs no scaling of the loss")
    run.options["model.dtype"] = (
        "bfloat16" if half else "tf32" if run.get("tf32") is True else "float32"
    )
    if stored not in ("float32", "auto") and not run.get("use_peft"):
        run.note(f"weights and optimizer state are float32; {stored} is only computed in")
    full = run.get("gradient_checkpointing") not in NO
    run.options["model.gradient_checkpointing"] = "full" if full else "none"


def every(run: Recipe, what: str, strategy: str, steps: Any, default: int) -> None:
    """Write the option `what` from a strategy and a number of updates or share of all."""
    if strategy in NO:
        run.options[what] = 0
    elif strategy == "steps" and steps and steps >= 1:
        run.options[what] = int(steps)
    elif strategy == "steps" and steps is None:
        run.options[what] = default
    else:
        run.options[what] = 0
        how = f"{steps} of all updates" if strategy == "steps" else strategy
        run.note(f"{what} 0, since it is a number of updates ({how} there): set it if you need it")


def intervals(run: Recipe) -> None:
    strategy = run.get("logging_strategy", "steps")
    every(run, "logging_steps", strategy, run.get("logging_steps"), 10)
    run.options["logging_steps"] = max(1, run.options["logging_steps"])
    every(run, "save_steps", run.get("save_strategy", "steps"), run.get("save_steps"), 500)
    if limit := run.get("save_total_limit"):
        run.options["save_total_limit"] = limit
    else:
        run.note("the two newest checkpoints are kept, and not all (save_total_limit)")
    if evaluated(run):
        steps = run.get("eval_steps", run.get("logging_steps"))
        every(run, "eval_steps", run.get("eval_strategy", "steps"), steps, 500)


def best(run: Recipe) -> None:
    """After `intervals`."""
    patience = run.get("early_stopping_patience")
    if not (run.get("load_best_model_at_end") or patience):
        return
    if not run.options.get("eval_steps"):
        run.refuse("load_best_model_at_end", "needs evaluations after a number of updates")
    values = {name: run.get(name) for name in ("metric_for_best_model", "greater_is_better")}
    run.options |= {name: value for name, value in values.items() if value is not None}
    run.options["load_best_model_at_end"] = True
    if patience:
        run.options["early_stopping_patience"] = patience
    run.note("each new best is saved, also between save_steps, and the best is never deleted")


def evaluated(run: Recipe) -> bool:
    return run.get("eval_strategy", "no") not in NO


def reports(run: Recipe) -> None:
    names = run.get("report_to", [])
    names = [names] if isinstance(names, str) else names
    if names in ([], ["none"], ["all"]):
        return
    known = [name for name in names if name in TRACKERS]
    if elsewhere := [str(name) for name in names if name not in TRACKERS]:
        run.note(f"metrics do not go to {', '.join(elsewhere)}")
    run.options["report_to"] = known


def clipping(run: Recipe) -> None:
    if (norm := run.get("max_grad_norm")) is not None:
        run.options["optimizer.max_grad_norm"] = max(norm, 0)


def order(run: Recipe) -> None:
    kind = run.get("train_sampling_strategy", "random")
    if kind not in ("random", "sequential"):
        return run.refuse(
            "train_sampling_strategy", f"{kind} is no order here; rows are packed by length anyway"
        )
    if kind == "sequential" or run.get("in_order"):
        run.options["data.shuffle"] = False


def length(run: Recipe) -> None:
    if limit := run.get("max_length"):
        run.options["data.max_length"] = limit
    run.options["data.truncation"] = run.get("truncation_mode", "keep_start")
    if run.task == "reward":  # its trainer leaves longer rows out
        run.options["data.truncation"] = "drop"
    if run.options["data.truncation"] == "drop":  # there, any share of the rows
        run.options.setdefault("data.max_dropped", 0.99)


def adapters(run: Recipe) -> None:
    quantized = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
    if not run.get("use_peft"):
        for name in filter(run.get, quantized):
            run.refuse(name, "quantized weights can only be frozen below adapters")
        return
    for name in filter(run.get, quantized):
        run.options["lora.quantize"] = quantized[name]
    if run.get("load_in_4bit") and run.get("bnb_4bit_quant_type", "nf4") != "nf4":
        run.refuse("bnb_4bit_quant_type", "4 bits are nf4")
    if run.get("load_in_8bit"):
        run.note("int8 has one scale per output, and no outliers apart as in LLM.int8()")
    targets = run.get("lora_target_modules")
    if targets in (["all-linear"], ["all"], "all"):
        targets = "all-linear"
    if not targets:
        return run.refuse(
            "lora_target_modules",
            "is not set, and peft's choice depends on the model; name the "
            "linear layers, such as [q_proj, v_proj], or all-linear",
        )
    tokens = run.get("trainable_token_indices")
    if isinstance(tokens, dict):  # table: ids
        if not all(isinstance(ids, list) for ids in tokens.values()):
            return run.refuse("trainable_token_indices", "gives a table no list of tokens")
        if len({*map(tuple, tokens.values())}) > 1:
            run.refuse("trainable_token_indices", "trains other tokens in each table")
        tokens = next(iter(tokens.values()), None)
    if tokens:
        run.options["lora.trainable_token_indices"] = tokens
        run.note("of trained tokens, the vectors of an untied head are trained, too")
    _saved(run)
    dropout = run.get("lora_dropout", 0.0)
    if dropout and run.task == "dpo":
        run.note(f"lora.dropout is 0 ({dropout} there), as TRL's DPO turns dropout off")
        dropout = 0.0
    run.options |= {
        "lora.target_modules": targets,
        "lora.r": run.get("lora_r", 16),
        "lora.alpha": run.get("lora_alpha", 32),
        "lora.dropout": dropout,
        "lora.rslora": run.get("use_rslora", False),
        "lora.dora": run.get("use_dora", False),
    }


def _saved(run: Recipe) -> None:
    """Modules that are trained in full beside adapters."""
    names = run.get("modules_to_save") or []
    names = names.split(",") if isinstance(names, str) else names
    names = [name.strip().rpartition(".")[2] for name in names]
    names = ["lm_head" if name == "embed_out" else name for name in names]  # its older name
    if run.task == "reward":  # its head is always trained
        names = [name for name in names if name not in SCORE_HEADS]
    if others := [name for name in names if name not in TABLES]:
        return run.refuse(
            "modules_to_save",
            f"{others[0]} is no embedding or language model head, and nothing else is trained in "
            "full beside adapters",
        )
    if names:
        run.options["lora.modules_to_save"] = names
        run.note(
            "lora.modules_to_save: of a model with a tied head, name the embedding alone; it is "
            "both, where peft unties them unless ensure_weight_tying is set"
        )


def revision(run: Recipe) -> None:
    if run.get("model_revision", "main") != "main":
        run.options["model.revision"] = run.get("model_revision")


def objective(run: Recipe) -> None:
    smoothing = run.get("label_smoothing_factor")
    if run.task == "sft" and run.get("loss_type") == "dft":
        run.options["sft.loss_type"] = "dft"
        if smoothing:
            run.note(f"sft.label_smoothing is 0: dft does not read {smoothing} there either")
    elif run.task == "sft" and smoothing:
        run.options["sft.label_smoothing"] = smoothing
    if run.task == "sft" and run.get("loss_type", "nll") not in ("nll", "chunked_nll", "dft"):
        run.refuse("loss_type", "is no loss of EasyAira")
    if run.task != "dpo":
        return
    weights = {name: run.get(name) for name in ("desirable_weight", "undesirable_weight")}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    losses = run.get("loss_type", "kto" if weights else ["sigmoid"])
    if losses in ("kto", ["kto"]):
        return kto(run, weights)
    for name in weights:
        run.refuse(name, f"weighs answers of kto, and loss_type is {losses}")
    run.options["dpo.loss_type"] = losses
    if weights := run.get("loss_weights"):
        run.options["dpo.loss_weights"] = weights
    names = [losses] if isinstance(losses, str) else losses
    if smoothing := run.get("label_smoothing"):  # which TRL 1.16 reads for these alone
        if set(names) <= {"robust", "exo_pair"}:
            run.options["dpo.label_smoothing"] = smoothing
        elif {"robust", "exo_pair"} & set(names):
            run.refuse("label_smoothing", "smooths some of the losses there, and all of them here")
        else:
            run.note(
                f"dpo.label_smoothing is 0: TRL 1.16 reads {smoothing} for robust and exo_pair"
            )
    if run.options.get("dpo.f_divergence_type") == "alpha_divergence":
        run.options["dpo.f_alpha_divergence_coef"] = run.get("f_alpha_divergence_coef", 0.5)


def kto(run: Recipe, weights: dict[str, Any]) -> None:
    """The loss of single answers. TRL estimates the KL divergence from the examples of a device,
    and averages it over all devices."""
    group = run.get("per_device_train_batch_size", 8)
    if group == 1:
        run.refuse("per_device_train_batch_size", "kto needs other examples beside each one")
    run.options |= {"dpo.loss_type": "kto", "dpo.kto_group": group}
    run.options |= {f"dpo.{name}": weight for name, weight in weights.items()}
    run.note("the examples whose answers estimate the KL divergence (dpo.kto_group) are drawn once")
    if run.devices > 1:
        run.note(f"the KL divergence is estimated from {group} examples, not from all devices'")


STEPS = (
    batch, order, schedule, optimizer, clipping, precision, intervals, best, reports, length,
    adapters, revision, objective,
)  # fmt: skip
