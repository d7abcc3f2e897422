"""Keys of allenai/open-instruct's finetune.py and dpo_tune_cache.py (2024 to 2025), and of the
names that they had before."""

from __future__ import annotations

import re

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

COMMON: Table = {
    **same("""
        model_name_or_path model.name_or_path
        tokenizer_name model.tokenizer
        tokenizer_name_or_path model.tokenizer
        learning_rate optimizer.learning_rate
        weight_decay optimizer.weight_decay
        num_train_epochs num_train_epochs
        num_epochs num_train_epochs
        max_train_steps max_steps
        max_train_samples data.max_examples
        seed seed
        output_dir output_dir
    """),
    **computed("""
        model_revision per_device_train_batch_size gradient_accumulation_steps
        lr_scheduler_type warmup_ratio clip_grad_norm=max_grad_norm max_seq_length=max_length
        use_lora=use_peft use_qlora=load_in_4bit lora_rank=lora_r lora_alpha lora_dropout
        dataset_name dataset_mixer dataset_mixer_list=dataset_mixer dataset_train_split
        dataset_mixer_list_splits=dataset_splits train_file=dataset_name
        dataset_config_name=dataset_config chat_template_name packing
        gradient_checkpointing logging_steps checkpointing_steps
        keep_last_n_checkpoints=save_total_limit
        report_to reduce_loss use_8bit_optimizer bf16 target_modules=lora_target_modules
    """),
    **no_effect(
        "says how PyTorch computes, and not what",
        "use_flash_attn use_slow_tokenizer low_cpu_mem_usage use_liger_kernel fused_optimizer "
        "timeout preprocessing_num_workers overwrite_cache zero_stage zero_hpz_partition_size "
        "concatenated_forward offload_optimizer offload_param trust_remote_code sync_each_batch "
        "activation_memory_budget",
    ),
    **no_effect(
        "the log, the report and the cache are EasyAira's own",
        "with_tracking wandb_project_name wandb_project wandb_entity exp_name run_name "
        "dataset_mix_dir dataset_cache_mode dataset_local_cache_dir dataset_config_hash "
        "dataset_skip_cache cache_dataset_only do_not_randomize_output_dir verbose "
        "reference_logprobs_cache_path",
    ),
    **no_effect(
        "the run uploads nothing and starts no other job",
        "push_to_hub hf_entity hf_repo_id hf_repo_revision hf_repo_url hf_metadata_dataset "
        "save_to_hub try_launch_beaker_eval_jobs try_auto_save_to_beaker gs_bucket_path "
        "oe_eval_tasks oe_eval_max_length oe_eval_gpu_multiplier eval_workspace eval_priority",
    ),
    **no_effect("a run resumes by the same command", "resume_from_checkpoint"),
    **no_effect("there is exactly one start token where the tokenizer has one", "add_bos"),
    **unsupported("the model is loaded as it is stored", "config_name additional_model_arguments",
                  (None, {}, "")),
    **unsupported("only sft.router_aux_loss adds this loss, with the weight of config.json",
                  "load_balancing_loss"),
    **no_effect("without load_balancing_loss", "load_balancing_weight"),
    "dataset_transform_fn": Unsupported("rows are tokenised in one way", (
        None, ["sft_tulu_tokenize_and_truncate_v1", "sft_tulu_filter_v1"],
        ["preference_tulu_tokenize_and_truncate_v1", "preference_tulu_filter_v1"],
    )),
    **no_effect("columns are known by their names", "dataset_target_columns"),
}  # fmt: skip

DPO: Table = {
    **same("""
        dpo_beta dpo.beta
        beta dpo.beta
        dpo_label_smoothing dpo.label_smoothing
        label_smoothing dpo.label_smoothing
    """),
    **computed("dpo_loss_type=loss_type loss_type dpo_gamma_beta_ratio=gamma_beta_ratio"),
    "dpo_use_paged_optimizer": Unsupported("no optimizer state is paged", (None, False, True)),
}  # fmt: skip

DEFAULTS = {
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.03,
    "num_train_epochs": 2,
    "clip_grad_norm": -1,
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "bf16": True,
    "chat_template_name": "tulu",
    "checkpointing_steps": None,
    "target_modules": ["q_proj", "o_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj"],
}
MEAN = "the loss is a mean over the tokens of an update, and not of means over devices"
ORDER = "the order of rows follows from the seed, by another generator"

LOSSES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "simpo": "simpo"}
AMOUNT = re.compile(r"\d+|\d*\.\d+|\d+\.")
TEMPLATES = ("tulu", "zephyr", "chatml")


def facts(run: Recipe) -> None:
    """Facts by transformers' names from open-instruct's own."""
    run.facts["completion_only_loss"] = run.facts["assistant_only_loss"] = True
    if run.get("load_in_4bit"):
        run.facts["use_peft"] = True
    if run.get("use_8bit_optimizer"):
        run.facts["optim"] = "adamw_8bit"
        run.keys["optim"] = "use_8bit_optimizer"
    saved = run.get("checkpointing_steps")
    run.facts["save_strategy"] = "epoch" if saved == "epoch" else "steps" if saved else "no"
    if str(saved).isdecimal():
        run.facts["save_steps"] = int(saved)
    elif saved not in (None, "epoch"):
        run.refuse("checkpointing_steps", f"{saved!r} is neither a number of updates nor epoch")
    if run.get("save_total_limit", 1) < 1:
        run.facts["save_total_limit"] = None
    template = run.get("chat_template_name")
    if template not in TEMPLATES:
        run.refuse("chat_template_name", f"{template} is none of {', '.join(TEMPLATES)}")
    run.facts["chat_template"] = template
    run.note("data.template tulu is what finetune.py writes unless chat_template_name says else")
    if run.get("reduce_loss") == "sum":
        run.note("the loss is a mean and not a sum over tokens, which AdamW's steps do not tell")
    if run.task == "dpo":
        loss = run.get("loss_type", "dpo")
        if not isinstance(loss, str) or loss not in LOSSES:
            return run.refuse("loss_type", f"{loss} is none of {', '.join(LOSSES)}")
        run.facts["loss_type"] = LOSSES[loss]
        if loss == "simpo":
            run.options["dpo.reference"] = "none"
            ratio = run.get("gamma_beta_ratio", 0.3)
            run.options["dpo.simpo_gamma"] = ratio * run.options["dpo.beta"]
    mixer = run.get("dataset_mixer", {})
    entries = list(mixer.items()) if isinstance(mixer, dict) else []
    if isinstance(mixer, list):  # name, amount, name, amount; a name may stand twice
        if len(mixer) % 2:
            run.refuse("dataset_mixer", "is a list of names, each with its amount; one lacks it")
        entries = list(zip(mixer[::2], mixer[1::2], strict=False))
    wrong = [amount for _, amount in entries if not AMOUNT.fullmatch(str(amount))]
    if wrong:
        return run.refuse("dataset_mixer", f"{wrong[0]!r} is neither a share nor a number of rows")
    entries = [(path, float(n) if "." in str(n) else int(n)) for path, n in entries]
    splits = run.get("dataset_splits") or ["train"]
    if len({*splits}) > 1:
        run.refuse("dataset_splits", "differ; write one, and the others in the translated file")
    run.facts["sources"] = [_source(run, path, n, splits[0]) for path, n in entries]


def _source(run: Recipe, path: str, amount: float, split: str) -> dict:
    """A share of the rows if `amount` is a fraction, or a number of them."""
    if isinstance(amount, float):
        used = {"path": path, "weight": amount, "split": split}
    else:
        run.note(f"a number of rows is the first ones of a split ({split}[:{amount}])")
        used = {"path": path, "split": f"{split}[:{amount}]"}
    return {key: value for key, value in used.items() if value not in (1.0, "train")}


OPEN_INSTRUCT = Source(
    name="open-instruct",
    tables={"sft": COMMON, "dpo": COMMON | DPO},
    defaults={
        "sft": DEFAULTS,
        "dpo": DEFAULTS | {"dpo_beta": 0.1},
    },
    differences={"sft": (MEAN, ORDER), "dpo": (ORDER,)},
    telling=dict.fromkeys(
        "dpo_beta beta dpo_loss_type loss_type dpo_label_smoothing label_smoothing".split(), "dpo"
    ),
    prepare=facts,
)
