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
        lr_scheduler_type warmup_ratio clip_grad_norm=max_grad_norm max_grad_norm
        max_seq_length=max_length tokenizer_revision add_bos
        use_lora=use_peft use_qlora=load_in_4bit lora_rank=lora_r lora_alpha lora_dropout
        dataset_name dataset_mixer dataset_mixer_list=dataset_mixer dataset_train_split
        dataset_mixer_list_splits=dataset_splits mixer_list=dataset_mixer
        mixer_list_splits=dataset_splits train_file=dataset_name
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
        "activation_memory_budget attn_backend tensor_parallel_degree context_parallel_degree "
        "pipeline_parallel_degree",
    ),
    **no_effect(
        "the log, the report and the cache are EasyAira's own",
        "with_tracking wandb_project_name wandb_project wandb_entity exp_name run_name "
        "dataset_mix_dir dataset_cache_mode dataset_local_cache_dir dataset_config_hash "
        "dataset_skip_cache cache_mode local_cache_dir skip_cache config_hash overwrite_output_dir "
        "add_seed_and_date_to_exp_name cache_dataset_only do_not_randomize_output_dir verbose "
        "reference_logprobs_cache_path",
    ),
    **no_effect(
        "the run uploads nothing and starts no other job",
        "push_to_hub hf_entity hf_repo_id hf_repo_revision hf_repo_url hf_metadata_dataset "
        "save_to_hub try_launch_beaker_eval_jobs try_auto_save_to_beaker gs_bucket_path "
        "oe_eval_tasks oe_eval_max_length oe_eval_gpu_multiplier eval_workspace eval_priority",
    ),
    **no_effect("a run resumes by the same command", "resume_from_checkpoint"),
    **unsupported("the model is loaded as it is stored", "config_name additional_model_arguments",
                  (None, {}, "")),
    **unsupported("only sft.router_aux_loss adds this loss, with the weight of config.json",
                  "load_balancing_loss"),
    **no_effect("without load_balancing_loss", "load_balancing_weight"),
    **unsupported("rows are tokenised in one way", "dataset_transform_fn transform_fn", (
        None, ["sft_tulu_tokenize_and_truncate_v1", "sft_tulu_filter_v1"],
        ["preference_tulu_tokenize_and_truncate_v1", "preference_tulu_filter_v1"],
    )),
    **no_effect("columns are known by their names", "dataset_target_columns target_columns"),
    **unsupported("rewards of single steps are no task of EasyAira", "prm_prepro"),
}  # fmt: skip

DPO: Table = {
    **same("""
        dpo_beta dpo.beta
        beta dpo.beta
        dpo_label_smoothing dpo.label_smoothing
        label_smoothing dpo.label_smoothing
    """),
    **computed("""
        dpo_loss_type=loss_type loss_type dpo_gamma_beta_ratio=gamma_beta_ratio gamma_beta_ratio
    """),
    **unsupported("ends before the first update", "cache_logprobs_only"),
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
    "keep_last_n_checkpoints": 3,
    "target_modules": ["q_proj", "o_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj"],
}
MEAN = (
    "the loss is a mean over the tokens of an update, and not of means over devices and "
    "accumulation steps"
)
SUM = (
    "the loss is a mean over the tokens of an update, and not their sum, with which updates of "
    "more tokens weigh more in AdamW's averages"
)
CLIPPING = (
    "nothing is clipped, as the file says; DeepSpeed clips at 1.0 where its own file has "
    "gradient_clipping auto, as open-instruct's stage 3 has (optimizer.max_grad_norm)"
)
START = (
    "an example begins with the tokenizer's start token, if it has one; there a chat template "
    "writes one with add_bos alone (its first version, without chat_template_name, always)"
)
CONVERSATIONS = (
    "of a conversation, the last answers are compared; there the mean of a length-normalised loss "
    "is over all its answers"
)
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
    if template == "tulu":
        run.note(
            "data.template tulu is what finetune.py writes unless chat_template_name says else; "
            "blanks around a message are stripped, as in its first version alone"
        )
    if not run.get("add_bos"):
        run.note(START)
    revision = run.get("model_revision", "main")
    if run.get("tokenizer_revision", revision) != revision:
        run.refuse("tokenizer_revision", "is another one than the model's")
    if not run.get("max_length"):
        run.note("examples are cut at the model's positions; there at tokenizer.model_max_length")
    if run.options.get("optimizer.weight_decay"):
        run.note("optimizer.weight_decay leaves out norms and biases; there biases alone")
    _loss(run)
    if run.task == "dpo":
        loss = run.get("loss_type", "dpo")
        if not isinstance(loss, str) or loss not in LOSSES:
            return run.refuse("loss_type", f"{loss} is none of {', '.join(LOSSES)}")
        run.facts["loss_type"] = LOSSES[loss]
        if loss == "simpo":
            run.options["dpo.reference"] = "none"
            ratio = run.get("gamma_beta_ratio", 0.3)
            run.options["dpo.simpo_gamma"] = ratio * run.options["dpo.beta"]
        if loss != "dpo":
            run.note(CONVERSATIONS)
    _mixture(run)


def _loss(run: Recipe) -> None:
    """How the tokens of an update are averaged in SFT, and what is clipped."""
    clipped = run.get("max_grad_norm", -1) > 0
    summed = run.task == "sft" and run.get("reduce_loss") == "sum"
    if run.task == "sft":
        run.note(SUM if summed else MEAN)
    if not clipped:
        run.note(CLIPPING)
    elif summed:
        run.refuse("max_grad_norm", "clips the gradient of a sum over tokens, and here of a mean")


def _mixture(run: Recipe) -> None:
    """Sources from names with shares or numbers of rows."""
    mixer = run.get("dataset_mixer", {})
    entries = list(mixer.items()) if isinstance(mixer, dict) else []
    if isinstance(mixer, list):  # name, amount, name, amount; a name may occur twice
        if len(mixer) % 2:
            run.refuse("dataset_mixer", "is a list of names, each with its amount; one lacks it")
        entries = list(zip(mixer[::2], mixer[1::2], strict=False))
    wrong = [amount for _, amount in entries if not AMOUNT.fullmatch(str(amount))]
    if wrong:
        return run.refuse("dataset_mixer", f"{wrong[0]!r} is neither a share nor a number of rows")
    entries = [(path, float(n) if "." in str(n) else int(n)) for path, n in entries]
    amounts = [amount for _, amount in entries]
    if any(type(amount) is int for amount in amounts) and max(amounts) <= 1:
        return run.refuse(
            "dataset_mixer", "1 is one row in some versions, and all in others; write 1.0 for all"
        )
    if entries and run.task == "sft":
        run.note(
            "rows of instruction, input and output keep their own words; there they are put into "
            "Alpaca's prompt (a template of the source in data.train)"
        )
    _limit(run, amounts)
    splits = run.get("dataset_splits") or ["train"]
    if len({*splits}) > 1:
        run.refuse("dataset_splits", "differ; write one, and the others in the translated file")
    run.facts["sources"] = [_source(run, path, n, splits[0]) for path, n in entries]


def _limit(run: Recipe, amounts: list[float]) -> None:
    """max_train_samples, a number of rows of all data sets together, as one of each."""
    limit = run.options.get("data.max_examples")
    shares = sum(amount if isinstance(amount, float) else 1.0 for amount in amounts)
    if not limit or limit < 0 or shares in (0, 1):
        return
    run.options["data.max_examples"] = each = max(1, int(limit / shares))
    run.note(
        f"data.max_examples {each} is of each data set, of which its share is drawn, so about "
        f"{limit} in all; there the first {limit} of all data sets, one after another"
    )


def _source(run: Recipe, path: str, amount: float, split: str) -> dict:
    """A share of the rows if `amount` is a fraction, or a number of them."""
    if isinstance(amount, float):
        used = {"path": path, "weight": amount, "split": split}
    else:
        run.note("a number of rows is the first ones of a split; there others, drawn at random")
        used = {"path": path, "split": f"{split}[:{amount}]"}
    return {key: value for key, value in used.items() if value not in (1.0, "train")}


OPEN_INSTRUCT = Source(
    name="open-instruct",
    tables={"sft": COMMON, "dpo": COMMON | DPO},
    defaults={
        "sft": DEFAULTS,
        "dpo": DEFAULTS | {"dpo_beta": 0.1},
    },
    differences={"sft": (ORDER,), "dpo": (ORDER,)},
    telling=dict.fromkeys(
        "dpo_beta beta dpo_loss_type loss_type dpo_label_smoothing label_smoothing "
        "dpo_gamma_beta_ratio gamma_beta_ratio".split(),
        "dpo",
    ),
    prepare=facts,
)
