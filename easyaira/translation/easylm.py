"""Flags of young-geng/EasyLM and of hamishivi/EasyLM, from a command line."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml

from easyaira.errors import ConfigError
from easyaira.translation.recipe import Recipe
from easyaira.translation.verdicts import (
    Source,
    Table,
    Unsupported,
    computed,
    no_effect,
    same,
    unsupported,
)

ADAMW = "optimizer.adamw_optimizer."
SETS = ("json_torch_dataset", "json_dataset", "huggingface_dataset", "tulu_json_dataset")
COMMON: Table = {
    **same(f"""
        mesh_dim mesh
        seed seed
        num_epochs num_train_epochs
        total_steps max_steps
        log_freq logging_steps
        save_model_freq save_steps
        tokenizer model.tokenizer
        {ADAMW}lr optimizer.learning_rate
        {ADAMW}b1 optimizer.adam_beta1
        {ADAMW}b2 optimizer.adam_beta2
        {ADAMW}weight_decay optimizer.weight_decay
        {ADAMW}clip_gradient optimizer.max_grad_norm
        logger.output_dir output_dir
    """),
    **computed(f"""
        module dtype load_checkpoint {ADAMW}end_lr=end_lr {ADAMW}warmup_ratio=warmup_ratio
        {ADAMW}lr_warmup_steps=warmup_steps optimizer.accumulate_gradient_steps=accumulate
        train_dataset.type=kind train_dataset.text_processor.fields=fields
        eval_steps eval_freq=eval_steps
    """),
    **{
        f"train_dataset.{name}.{flag}": verdict
        for name in SETS
        for flag, verdict in computed(
            "hf_name=path path=path hf_split=split split=split name=dataset_config "
            "seq_length=max_length batch_size=batch_size"
        ).items()
    },
    **no_effect(
        "says how EasyLM loads and computes, and not what",
        "initialize_jax_distributed jax_distributed.initialize_jax_distributed load_dataset_state "
        "tokenizer_pad_token_id tokenizer.vocab_file tokenizer.add_bos_token use_tpu "
        "log_all_worker save_milestone_freq checkpointer.save_optimizer_state "
        "checkpointer.float_dtype optimizer.accumulate_gradient_steps_dtype llama.remat_block "
        + ADAMW
        + "lr_decay_steps "
        + ADAMW
        + "bf16_momentum "
        + ADAMW
        + "init_lr "
        + " ".join(
            f"train_dataset.{name}.{flag}"
            for name in SETS
            for flag in "num_workers tokenizer_processes tokenizer_parallel_chunk_size "
            "tokenizer_parallel_batch_size streaming use_auth_token index_at_start "
            "example_index_at_start tokens_count_at_start start_seek_loc enable_padding num_proc "
            "batch_token_dtype throughput_average_window_size".split()
        ),
    ),
    **no_effect(
        "the log and the report are EasyAira's own",
        "logger.online logger.prefix logger.prefix_to_id logger.project logger.entity "
        "logger.wandb_dir logger.notes logger.experiment_id",
    ),
    "load_llama_config": computed("load_llama_config=model_size")["load_llama_config"],
    **unsupported("the checkpoint's own config.json says it", "update_llama_config", (None, "")),
    **unsupported(
        "a text has its start and end token once",
        "train_dataset.text_processor.add_bos_token train_dataset.text_processor.add_eos_token",
        (None, True),
    ),
    **unsupported(
        "a text has its start and end token once",
        " ".join(f"train_dataset.{name}.always_start_with_bos" for name in SETS),
        (None, False),
    ),
    "optimizer.type": Unsupported("the optimizer is AdamW", (None, "adamw")),
    ADAMW + "multiply_by_parameter_scale": Unsupported("the optimizer is AdamW", (None, False)),
    **{
        f"train_dataset.{name}.remove_truncated_samples": computed("remove_truncated_samples")[
            "remove_truncated_samples"
        ]
        for name in SETS
    },
}
DPO: Table = same("""
    dpo_beta dpo.beta
    beta dpo.beta
""")
DEFAULTS = {
    "seed": 42,
    ADAMW + "b2": 0.95,
    ADAMW + "weight_decay": 1e-4,
    ADAMW + "lr": 0.01,
    ADAMW + "end_lr": 0.001,
    "num_epochs": 1,
    "log_freq": 50,
    "save_model_freq": 0,
}
MODULES = {"llama_train": "sft", "llama_train_dpo": "dpo", "llama_train_rm": "reward"}
JOINED = ("json", "huggingface")  # kinds of data that join texts and cut them
TULU = ("tulu_json_torch", "preference_json_torch", "tulu_json", "preference_json")


def flags_of(line: str) -> dict[str, Any]:
    """Flags of a command line, with the last part of its module under `module`.

    Raises:
        ConfigError: it holds no flags, or is quoted wrongly.
    """
    try:
        words = shlex.split(line.replace("\\\n", " "))
    except ValueError as error:
        raise ConfigError(f"the command line: {error}") from error
    flags: dict[str, Any] = {}
    for place, word in enumerate(words):
        if module := re.fullmatch(r"EasyLM\.models\.llama\.(\w+)", word):
            flags["module"] = module[1]
        if match := re.fullmatch(r"--([\w.]+)(?:=(.*))?", word, re.DOTALL):
            value = match[2]
            if value is None:
                value = words[place + 1] if place + 1 < len(words) else "true"
            plain = match[1].endswith(("mesh_dim", "tokenizer", "path", "fields"))
            flags[match[1]] = value if plain or not value else _value(value)
    if not flags.keys() - {"module"}:
        raise ConfigError("easylm: expected a command line with flags such as --mesh_dim='1,-1,1'")
    return flags


def _value(text: str) -> Any:
    """A number, a truth value or a list; text where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def facts(run: Recipe) -> None:
    """Facts by transformers' names from EasyLM's own."""
    run.facts["dtype"] = {"bf16": "bfloat16", "fp32": "float32"}.get(run.get("dtype"), "float32")
    size, steps = run.get("batch_size", 8), run.get("accumulate", 1)
    run.options |= {"train_batch_size": size * steps, "gradient_accumulation_steps": steps}
    run.note(
        f"train_batch_size {size * steps} is {size} over all devices x {steps} accumulation steps"
    )
    end, rate = run.get("end_lr", 0), run.options.get("optimizer.learning_rate")
    if not rate:
        return run.refuse(ADAMW + "lr", "is the peak rate; set it above 0")
    run.facts["lr_scheduler_type"] = "cosine_with_min_lr" if end else "cosine"
    run.facts["lr_scheduler_kwargs"] = {"min_lr_rate": end / rate} if end else {}
    if run.get("warmup_ratio") is not None and not end:  # of the fork, whose decay is linear
        run.facts["lr_scheduler_type"] = "linear"
    run.note(
        "the rate is taken to fall linearly where warmup_ratio is set and end_lr is 0 (the fork by "
        "hamishivi), and as a cosine elsewhere"
    )
    if "://" in (place := run.options.get("output_dir", "")):
        run.options |= {"output_dir": "runs/easylm", "checkpoint_dir": place}
        run.note(f"output_dir is a folder of this machine; checkpoints go to {place}")
    run.facts["save_steps"], run.facts["logging_steps"] = (
        run.options.pop("save_steps", 0), run.options.pop("logging_steps", 50),
    )  # fmt: skip
    run.facts["save_strategy"] = "steps" if run.facts["save_steps"] else "no"
    if run.get("remove_truncated_samples"):
        run.facts["truncation_mode"] = "drop"
    _model(run)
    kind = run.get("kind", "huggingface")
    if run.task == "sft" and kind in JOINED:
        _joined(run)
    elif kind not in TULU:
        run.refuse("kind", f"{kind} has no translation")
    else:
        run.note("the order of rows follows from the seed, by another generator")
    run.facts |= {"completion_only_loss": True, "assistant_only_loss": True}
    run.facts["chat_template"] = "plain" if run.get("texts") else "tulu"
    source = {"path": run.get("path"), "split": run.get("split")}
    source["subset"] = run.get("dataset_config")
    run.facts["sources"] = [{k: v for k, v in source.items() if v not in (None, "train", "")}]


def _model(run: Recipe) -> None:
    """The weights to start from: EasyLM's, or random ones."""
    if checkpoint := str(run.get("load_checkpoint", "")):
        run.options["model.name_or_path"] = checkpoint.partition("::")[2] or checkpoint
        return run.note(
            "model.name_or_path is EasyLM's checkpoint; convert it (easyaira convert from_easylm), "
            "and name the new folder"
        )
    if run.task != "sft" or not (size := run.get("model_size")):
        return run.refuse("load_checkpoint", "names no weights, and training starts from a model")
    run.options |= {"model.name_or_path": str(size), "model.init": "random"}
    return run.note(
        f"model.name_or_path {size} stands for a folder with config.json and tokenizer of a Llama "
        "of that size; its weights are not read"
    )


def _joined(run: Recipe) -> None:
    """Texts that are joined and cut, in the order of their file."""
    field = run.get("fields", "[prompt],completion")
    if not re.fullmatch(r"\w+", str(field)):
        run.refuse("fields", f"{field}: texts of one column are joined, such as text")
    elif field != "text":
        run.facts["dataset_text_field"] = field
    run.facts |= {"texts": True, "max_length": run.get("max_length", 1024)}
    run.options |= {"data.texts": "join", "data.shuffle": False}
    run.note(
        "all texts are tokenised before the first update; where the run visits a part of them, set "
        "data.max_examples (texts)"
    )
    run.note(
        "the first token of an example has no loss, one of max_length; there it follows the end of "
        "the example before"
    )


EASYLM = Source(
    name="EasyLM",
    tables={"sft": COMMON, "dpo": COMMON | DPO, "reward": COMMON},
    defaults={"sft": DEFAULTS, "dpo": DEFAULTS | {"beta": 0.1}, "reward": DEFAULTS},
    differences={task: () for task in ("sft", "dpo", "reward")},
    telling={"module": MODULES},
    prepare=facts,
)
