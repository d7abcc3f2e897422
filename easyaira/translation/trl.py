"""Keys of TRL 1.16's SFTConfig, DPOConfig, KTOConfig, RewardConfig, ModelConfig, ScriptArguments
and DatasetMixtureConfig, with those that they inherit from transformers 5.24, and those of the
alignment handbook and of TRL since 0.7 that have gone."""

from __future__ import annotations

from easyaira.translation.recipe import MIXTRAL, Recipe
from easyaira.translation.verdicts import (
    Source,
    Table,
    Unsupported,
    computed,
    no_effect,
    same,
    unsupported,
)

TRAINING: Table = {
    **same("""
        output_dir output_dir
        learning_rate optimizer.learning_rate
        weight_decay optimizer.weight_decay
        adam_beta1 optimizer.adam_beta1
        adam_beta2 optimizer.adam_beta2
        adam_epsilon optimizer.adam_epsilon
        num_train_epochs num_train_epochs
        max_steps max_steps
        seed seed
        dataloader_drop_last data.drop_last
        max_length data.max_length
    """),
    **computed("""
        per_device_train_batch_size gradient_accumulation_steps
        lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
        optim max_grad_norm bf16 fp16 tf32 gradient_checkpointing train_sampling_strategy
        logging_strategy logging_steps
        eval_strategy evaluation_strategy=eval_strategy eval_steps
        save_strategy save_steps save_total_limit
        load_best_model_at_end metric_for_best_model greater_is_better
        report_to max_seq_length=max_length
    """),
    **no_effect(
        "says how PyTorch computes, and not what",
        "use_cpu no_cuda use_liger_kernel use_liger liger_kernel_config torch_compile "
        "torch_compile_backend torch_compile_mode use_cache torch_empty_cache_steps "
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs "
        "activation_offloading accelerator_config parallelism_config ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp "
        "ignore_bias_buffers fsdp_config deepspeed local_rank bf16_full_eval fp16_full_eval "
        "eval_accumulation_steps eval_use_gather_object eval_do_concat_batches "
        "skip_memory_metrics full_determinism "
        "padding_free pad_to_multiple_of enable_jit_checkpoint attn_implementation "
        "use_flash_attention_2 pad_token trust_remote_code average_tokens_across_devices",
    ),
    **no_effect(
        "the loader is EasyAira's own",
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "remove_unused_columns label_names dataset_num_proc preprocessing_num_workers data_seed "
        "shuffle_dataset length_column_name ignore_data_skip per_device_eval_batch_size "
        "dataset_batch_size use_num_proc num_proc",
    ),
    **no_effect(
        "the log, the bar and the report are EasyAira's own",
        "logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen "
        "log_level log_level_replica disable_tqdm run_name project trackio_space_id "
        "trackio_bucket_id trackio_static_space_id logging_dir debug verbose wandb_project "
        "wandb_entity wandb_log_unique_prompts hub_model_revision",
    ),
    **no_effect(
        "a run folder always holds what resuming needs, and resumes by the same command",
        "save_only_model save_on_each_node save_safetensors resume_from_checkpoint "
        "restore_callback_states_from_checkpoint overwrite_output_dir do_train do_predict",
    ),
    **no_effect("eval_strategy says so, too", "do_eval"),
    **no_effect(
        "held-out rows are evaluated before the first update and after the last, with our metrics",
        "eval_delay prediction_loss_only eval_on_start include_for_metrics batch_eval_metrics",
    ),
    **no_effect(
        "set push_to_hub in the translated file to upload",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision push_to_hub_revision push_to_hub_model_id",
    ),
    **unsupported(
        "the optimizers are AdamW and Muon over all trainable weights",
        "optim_args optim_target_modules",
    ),
    **unsupported("is no loss of EasyAira", "neftune_noise_alpha"),
    **unsupported("the batch is what the file says", "auto_find_batch_size"),
    **unsupported("the model is loaded as it is stored", "model_init_kwargs", (None, {})),
    "group_by_length": Unsupported(
        "updates do not go by length; rows are packed by it within an update", (None, False)
    ),
}

UNSMOOTHED = no_effect("only the loss of SFT reads it, there too", "label_smoothing_factor")

MODEL: Table = {
    **same("""
        model_name_or_path model.name_or_path
        tokenizer_name_or_path model.tokenizer
    """),
    **computed("""
        model_revision dtype torch_dtype=dtype use_peft lora_r lora_alpha lora_dropout
        lora_target_modules lora_modules_to_save=modules_to_save use_rslora use_dora
        load_in_8bit load_in_4bit bnb_4bit_quant_type chat_template eos_token
    """),
    **no_effect(
        "says how bitsandbytes stores, and not what",
        "use_bnb_nested_quant bnb_4bit_quant_storage bnb_4bit_compute_dtype",
    ),
    **no_effect("follows from the command", "lora_task_type"),
    **unsupported("adapters are LoRA or DoRA on linear layers", "lora_target_parameters"),
    **unsupported(
        "the file it names cannot be read here; pass it as chat_template", "chat_template_path"
    ),
}

DATA: Table = {
    **computed("""
        dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
        datasets streaming=dataset_streaming test_split_size
        dataset_mixer dataset_mixture dataset_splits dataset_configs
    """),
    **no_effect("columns are known by their names", "auto_insert_empty_system_msg columns_to_keep"),
}

SFT: Table = {
    **computed("""
        packing completion_only_loss assistant_only_loss truncation_mode loss_type
        label_smoothing_factor dataset_text_field packing_strategy
    """),
    **no_effect("packing changes padding only", "eval_packing"),
    **unsupported(
        "rows are tokenised in one way",
        "dataset_kwargs",
        (
            None,
            {},
            {"add_special_tokens": False, "append_concat_token": False},
            {"skip_prepare_dataset": False},
            {"add_special_tokens": False},
        ),
    ),
    **unsupported(
        "packing keeps examples whole", "num_of_sequences chars_per_token", (None, 1024, 3.6)
    ),
}

DPO: Table = {
    **UNSMOOTHED,
    **same("""
        beta dpo.beta
        f_divergence_type dpo.f_divergence_type
        rpo_alpha dpo.sft_weight
        ld_alpha dpo.ld_alpha
        use_weighting dpo.use_weighting
        simpo_gamma dpo.simpo_gamma
        max_prompt_length data.max_prompt_length
    """),
    **computed("""
        label_smoothing loss_type loss_weights f_alpha_divergence_coef truncation_mode
        desirable_weight undesirable_weight
    """),
    **no_effect(
        "the reference's log-probabilities are computed once, before training",
        "precompute_ref_log_probs precompute_ref_batch_size precompute_ref_eval_batch_size",
    ),
    **no_effect(
        "nothing is generated", "generate_during_eval max_completion_length max_target_length"
    ),
    "discopop_tau": Unsupported("the temperature is the paper's 0.05", (None, 0.05)),
    **unsupported("the reference is a model", "reference_free"),
    **unsupported("moves the reference during the run", "sync_ref_model"),
    **no_effect("without sync_ref_model", "ref_model_mixup_alpha ref_model_sync_steps"),
    "disable_dropout": Unsupported("DPO has no dropout here", (None, True)),
}

REWARD: Table = {
    **UNSMOOTHED,
    **same("center_rewards_coefficient reward.center_rewards_coefficient"),
    "disable_dropout": Unsupported("set model.dropout in the translated file", (None, True)),
    **no_effect("the ends of rows are kept", "truncation_mode"),
}

COMMON = TRAINING | MODEL | DATA | computed("router_aux_loss_coef")
DEFAULTS = {
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3.0,
    "max_length": 1024,
    "gradient_checkpointing": True,
    "bf16": True,  # null means so, too
    "save_steps": 500,
    "save_strategy": "steps",
    "eval_strategy": "no",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
}
BATCHES = "the order of rows follows from the seed, by another generator"
OF_PAIRS = "a file without loss_type is DPOConfig's; one of KTO, ORPO or CPO needs its loss_type"
DROPOUT = (
    "model.dropout is 0, whatever config.json says (GPT-2 has 0.1; Llama, Mistral, Qwen and Gemma "
    "have none)"
)


def facts(run: Recipe) -> None:
    """The loss that balances experts, which TRL adds to SFT, DPO and KTO with the weight of
    config.json, unless router_aux_loss_coef sets another."""
    weight = run.get("router_aux_loss_coef")
    mixtral = MIXTRAL.search(str(run.options.get("model.name_or_path", "")))
    if weight:
        why = "only sft.router_aux_loss adds this loss, with the weight of config.json"
        run.refuse("router_aux_loss_coef", why)
    elif mixtral and weight is None and run.task == "sft":
        run.options["sft.router_aux_loss"] = True
        run.note(
            "sft.router_aux_loss balances the experts of each example, weighted by its tokens; "
            "there of a micro-batch"
        )
    elif mixtral and weight is None and run.task == "dpo":
        run.note("no loss that balances the experts is added; there router_aux_loss_coef times it")


TRL = Source(
    name="TRL 1.16",
    tables={"sft": COMMON | SFT, "dpo": COMMON | DPO, "reward": COMMON | REWARD},
    defaults={
        "sft": DEFAULTS | {
            "learning_rate": 2e-5, "completion_only_loss": None, "assistant_only_loss": False,
        },
        "dpo": DEFAULTS | {"learning_rate": 1e-6},
        "reward": DEFAULTS | {"learning_rate": 1e-4},
    },
    differences={"sft": (BATCHES, DROPOUT), "dpo": (BATCHES, OF_PAIRS), "reward": (BATCHES,)},
    telling={
        "loss_weights": "dpo", "precompute_ref_log_probs": "dpo",
        "label_smoothing": "dpo", "rpo_alpha": "dpo",
        "desirable_weight": "dpo", "undesirable_weight": "dpo",
        "packing": "sft", "completion_only_loss": "sft", "assistant_only_loss": "sft",
        "dataset_text_field": "sft", "packing_strategy": "sft",
        "center_rewards_coefficient": "reward",
    },
    prepare=facts,
)  # fmt: skip
