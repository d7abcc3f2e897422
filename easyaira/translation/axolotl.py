"""Keys of axolotl 0.19, with those of its older examples."""

from __future__ import annotations

import re

from easyaira.translation import axolotl_data
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

HARMLESS = (  # plugins that change no number
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    "axolotl.integrations.liger.LigerPlugin",
    "axolotl.integrations.swanlab.SwanLabPlugin",
)
# layers of the text model inside a model for images and text, after escapes are removed
OF_TEXT_MODEL = re.compile(
    r"(?:model\.language_model|language_model\.model)\.layers\.d\+\."
    r"(?:\(_checkpoint_wrapped_module\.\)\?)?\((.+)\)\.\((.+)\)_proj"
)
EXPERTS = re.compile(r"mixtral|moe|\d+x\d+|-a\d+b", re.IGNORECASE)  # in names of models
NO_FAMILY = "is for mixtures of experts; Mixtral is the only one here"
ROUTER = "output_router_logits"
LINEAR = {"q", "k", "v", "o", "gate", "up", "down"}

COMMON: Table = {
    **same("""
        base_model model.name_or_path
        tokenizer_config model.tokenizer
        output_dir output_dir
        learning_rate optimizer.learning_rate
        weight_decay optimizer.weight_decay
        adam_beta1 optimizer.adam_beta1
        adam_beta2 optimizer.adam_beta2
        adam_epsilon optimizer.adam_epsilon
        adam_eps optimizer.adam_epsilon
        num_epochs num_train_epochs
        max_steps max_steps
        seed seed
        lora_model_dir lora.adapter
    """),
    **computed("""
        revision_of_model=model_revision
        micro_batch_size=per_device_train_batch_size gradient_accumulation_steps
        lr_scheduler=lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
        cosine_min_lr_ratio optimizer=optim max_grad_norm bf16 bfloat16=bf16 fp16 float16=fp16 tf32
        gradient_checkpointing torch_dtype=dtype logging_steps
        eval_strategy evaluation_strategy=eval_strategy eval_steps evals_per_epoch
        save_strategy save_steps saves_per_epoch save_total_limit
        sequence_len=max_length excess_length_strategy sample_packing=packing
        adapter load_in_8bit load_in_4bit lora_r lora_alpha lora_dropout lora_target_modules
        load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience
        peft_trainable_token_indices=trainable_token_indices
        lora_target_linear peft_use_rslora=use_rslora peft_use_dora=use_dora
        lora_modules_to_save=modules_to_save
        pretraining_dataset=axolotl_texts streaming=axolotl_streaming pretrain_multipack_attn
        pretraining_sample_concatenation reinit_weights
        datasets=axolotl_datasets test_datasets=axolotl_held_out val_set_size=test_split_size
        chat_template=axolotl_template chat_template_jinja train_on_inputs special_tokens tokens
        mean_resizing_embeddings dataset_exact_deduplication curriculum_sampling=in_order
        model_config overrides_of_model_config quantize_moe_experts
        tokenizer_use_mistral_common=mistral_common
    """),
    **no_effect(
        "says how PyTorch computes, and not what",
        "model_type tokenizer_type is_llama_derived_model is_mistral_derived_model "
        "is_qwen_derived_model is_falcon_derived_model attn_implementation flash_attention "
        "xformers_attention sdp_attention sdpa_attention flex_attention "
        "flex_attn_compile_kwargs s2_attention flash_attn_cross_entropy flash_attn_rms_norm "
        "flash_attn_fuse_mlp flash_attn_fuse_qkv flash_optimum eager_attention "
        "gradient_checkpointing_kwargs activation_offloading fsdp fsdp_config fsdp_version "
        "deepspeed ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_find_unused_parameters local_rank device device_map low_cpu_mem_usage "
        "torch_compile torch_compile_backend torch_compile_mode tiled_mlp lora_mlp_kernel "
        "lora_qkv_kernel lora_o_kernel cut_cross_entropy liger_rope liger_rms_norm "
        "liger_glu_activation liger_layer_norm liger_swiglu liger_cross_entropy "
        "liger_fused_linear_cross_entropy liger_rms_norm_gated dp_shard_size dp_replicate_size "
        "context_parallel_size tensor_parallel_size sequence_parallel_degree heads_k_stride "
        "lora_fan_in_fan_out gptq_groupsize gptq_model_v1 torchdistx_path trust_remote_code "
        "pad_to_sequence_len eval_sample_packing eval_batch_size micro_eval_batch_size "
        "tokenizer_use_fast tokenizer_legacy bnb_config_kwargs strict use_ray ray_num_workers "
        "use_kernels fused_attn_kernel multipack_real_batches sample_packing_bin_size "
        "sample_packing_group_size sample_packing_eff_est max_packed_sequence_len "
        "embeddings_skip_upcast dataloader_num_workers dataloader_pin_memory "
        "dataloader_prefetch_factor remove_unused_columns dataset_processes dataset_num_proc "
        "streaming_multipack_buffer_size pretrain_multipack_buffer_size",
    ),
    **no_effect(
        "the log, the report and the cache are EasyAira's own",
        "use_wandb use_tensorboard wandb_project wandb_entity wandb_watch wandb_name "
        "wandb_run_id wandb_log_model wandb_mode mlflow_experiment_name mlflow_tracking_uri "
        "mlflow_run_name comet_project_name debug dataset_prepared_path dataset_keep_in_memory "
        "push_dataset_to_hub eval_table_size eval_max_new_tokens eval_table_max_new_tokens "
        "shuffle_merged_datasets logging_dir use_swanlab swanlab_project "
        "swanlab_experiment_name swanlab_description swanlab_mode swanlab_log_completions "
        "swanlab_completion_log_interval swanlab_completion_max_buffer swanlab_workspace "
        "swanlab_log_model use_otel_metrics otel_metrics_host otel_metrics_port "
        "include_tokens_per_second profiler_steps test_value",
    ),
    **no_effect(
        "set push_to_hub in the translated file to upload",
        "hub_model_id hub_strategy hf_use_auth_token hub_revision push_to_hub",
    ),
    **no_effect(
        "a run folder always holds what resuming needs, and resumes by the same command",
        "resume_from_checkpoint auto_resume_from_checkpoints save_safetensors save_only_model",
    ),
    **no_effect("axolotl 0.19 does not read it", "label_smoothing_factor"),
    **no_effect("a tied head always follows the embedding", "peft_ensure_weight_tying"),
    **no_effect("a loss that is not finite ends the run", "loss_watchdog_threshold "
                "loss_watchdog_patience"),
    "plugins": Unsupported("only those that change no number have a translation", (None, []),
                           HARMLESS),
    **unsupported("updates do not go by length; rows are packed by it within an update",
                  "group_by_length"),
    **no_effect("the examples of an update do not depend on their packing",
                "sample_packing_sequentially"),
    **unsupported("adds tokens to the tokenizer; save it with them", "added_tokens_overrides",
                  (None, [])),
    **unsupported("adapters alone are trained", "unfrozen_parameters", (None, [])),
    **unsupported("adapters are LoRA or DoRA on linear layers",
                  "lora_target_parameters peft_layers_to_transform peft_layer_replication "
                  "loraplus_lr_ratio peft relora "
                  "relora_prune_ratio relora_cpu_offload jagged_restart_steps lora_on_cpu "
                  "jagged_restart_warmup_steps jagged_restart_anneal_steps lisa_n_layers "
                  "lisa_step_interval lisa_layers_attribute", (None, False, [])),
    **unsupported("is no loss of EasyAira", "neftune_noise_alpha noisy_embedding_alpha use_eaft "
                  "eaft_alpha eaft_k diffusion ebft"),
    **unsupported("the optimizers are AdamW and Muon over all trainable weights", "optim_args "
                  "optim_target_modules lr_groups embedding_lr embedding_lr_scale eta_min "
                  "lr_quadratic_warmup cosine_constant_lr_ratio"),
    **unsupported("the model is loaded as it is stored", "model_kwargs "
                  "overrides_of_model_kwargs "
                  "fix_untrained_tokens cls_model_config resize_token_embeddings_to_32x",
                  (None, False, {})),
    **unsupported("weights are bfloat16, int8 or nf4 at rest", "gptq gptq_disable_exllama qat fp8 "
                  "fp8_enable_fsdp_float8_all_gather quantization llmcompressor nvfp4_merge_aware"),
    **unsupported("images and sound are no data of EasyAira", "processor_type freeze_mm_modules "
                  "image_size skip_prepare_dataset"),
    **unsupported(NO_FAMILY, "use_scattermoe use_sonicmoe experts_implementation "
                  "llama4_linearized_experts "
                  "expert_parallel_size dsv4_fp4_grouped_mode ple_cpu_offload"),
    **unsupported("a template ends answers with its own tokens", "eot_tokens", (
        None, [], ["<end_of_turn>"], ["<|im_end|>"], ["<|eot_id|>"], ["</s>"],
    )),
    **unsupported("the template is rendered without arguments", "chat_template_kwargs "
                  "default_system_message", (None, {})),
    **unsupported("on-policy training is not translated", "trl vllm process_reward_model "
                  "gemma4_hybrid_attn_impl"),
    "rl": Unsupported(
        "is no algorithm that is translated", (None, False, "dpo", "ipo", "simpo", "orpo")
    ),
    "reward_model": Unsupported("set false, or --task reward", (None, False, True)),
    "num_labels": Unsupported("a reward model has one score", (None, 1)),
}  # fmt: skip

NOT_READ = no_effect("axolotl 0.19 reads it for SFT alone", "min_sample_len")
SFT: Table = computed("min_sample_len")
DPO: Table = {
    **NOT_READ,
    **same("""
        rl_beta dpo.beta
        dpo_beta dpo.beta
        orpo_alpha dpo.beta
        dpo_label_smoothing dpo.label_smoothing
        rpo_alpha dpo.sft_weight
        dpo_use_weighting dpo.use_weighting
        simpo_gamma dpo.simpo_gamma
    """),
    **computed("""
        rl=loss_type cpo_alpha kto_desirable_weight=desirable_weight
        kto_undesirable_weight=undesirable_weight
    """),
    **no_effect("the reference's log-probabilities are computed once, before training",
                "precompute_ref_log_probs"),
    **unsupported("is no loss of EasyAira", "dpo_norm_loss"),
}  # fmt: skip
REWARD: Table = {
    **NOT_READ,
    **same("center_rewards_coefficient reward.center_rewards_coefficient"),
}

DEFAULTS = {
    "micro_batch_size": 1,
    "num_epochs": 1,
    "learning_rate": 5e-5,
    "lr_scheduler": "cosine",
    "gradient_checkpointing": False,
    "sequence_len": 512,
    "save_strategy": "epoch",
    "lora_dropout": 0.0,
    "train_on_inputs": False,
}
ORDER = "the order of rows follows from the seed, by another generator"
DROPOUT = "model.dropout is 0, whatever config.json says"


def facts(run: Recipe) -> None:
    """Facts by transformers' names from axolotl's own."""
    kind = run.get("adapter")
    run.facts["use_peft"] = kind in ("lora", "qlora")
    if kind not in (None, "lora", "qlora"):
        run.refuse("adapter", f"{kind} is no adapter of EasyAira")
    if kind == "qlora" and not run.get("load_in_8bit"):
        run.facts["load_in_4bit"] = True
    if not kind:  # without adapters, the two flags have no effect
        run.facts |= {"load_in_4bit": None, "load_in_8bit": None}
    if run.get("lora_target_linear"):
        run.facts["lora_target_modules"] = "all-linear"
    if run.get("reinit_weights"):
        run.options["model.init"] = "random"
        run.note("model.init random draws by initializer_range of config.json, other numbers")
    _experts(run)
    for key in ("model_config", "overrides_of_model_config"):
        _model_config(run, key)
    pattern = run.get("lora_target_modules")
    if isinstance(pattern, str) and "language_model" in pattern:
        _of_text_model(run, pattern)
    if run.get("mistral_common"):
        run.note(
            "tokenizer.json and the chat template of the model's folder are used, and not "
            "mistral-common: compare a conversation (easyaira inspect shows its tokens)"
        )
    if "warmup_steps" not in run.facts and "warmup_ratio" not in run.facts:
        run.facts["warmup_ratio"] = 0.03
        run.note("the warm-up is 0.03 of all updates, without axolotl's limit of 100 updates")
    for what, per_epoch in {"eval": "evals_per_epoch", "save": "saves_per_epoch"}.items():
        times = run.get(per_epoch)
        if times is not None and run.get(f"{what}_steps") is None:
            run.facts[f"{what}_strategy"] = "epoch" if times else "no"
        elif run.get(f"{what}_steps"):
            run.facts[f"{what}_strategy"] = "steps"
    run.facts["completion_only_loss"] = not run.get("train_on_inputs")
    run.facts["assistant_only_loss"] = not run.get("train_on_inputs")
    if run.get("loss_type") in ("simpo", "orpo"):
        run.options["dpo.reference"] = "none"
    if run.get("loss_type") == "orpo":  # beside the likelihood, in its trainer, too
        run.options["dpo.sft_weight"] = 1.0
        run.note(
            "orpo adds the likelihood of the chosen answer, a mean over answers; there that of its "
            "prompt, too, a mean over tokens"
        )
    elif run.get("loss_type") == "simpo":  # of TRL's CPOTrainer, whose cpo_alpha is 1
        run.options["dpo.sft_weight"] = weight = run.get("cpo_alpha", 1.0)
        if weight:
            run.note(
                f"simpo adds the likelihood of the chosen answer (cpo_alpha {weight}, 1 where the "
                "file has none), a mean over answers; there a mean over tokens. The paper has none"
            )
    elif run.get("loss_type") == "dpo":
        run.facts["loss_type"] = "sigmoid"
    for weight in ("desirable_weight", "undesirable_weight"):
        if run.facts.get(weight) == 0:  # axolotl takes 0 for not set
            run.facts[weight] = None
    excess = run.get("excess_length_strategy", "drop")
    run.facts["truncation_mode"] = "keep_start" if excess == "truncate" else "drop"
    if excess == "raise":
        run.options["data.max_dropped"] = 0.0
    axolotl_data.templates(run)
    axolotl_data.tokens(run)
    axolotl_data.sources(run)
    axolotl_data.filters(run)


def _experts(run: Recipe) -> None:
    """Adapters and quantised weights of Mixtral, whose experts transformers 5 holds as parameters
    that are not linear layers."""
    if not MIXTRAL.search(_name(run)):
        if run.get("quantize_moe_experts"):
            run.refuse("quantize_moe_experts", NO_FAMILY)
        return
    if run.get("lora_target_linear"):
        run.facts["lora_target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        run.note(
            "lora_target_linear leaves out router and experts, which are no linear layers in "
            "transformers 5: the adapters are those of attention"
        )
    quantized = run.get("load_in_4bit") or run.get("load_in_8bit")
    if quantized and not run.get("quantize_moe_experts"):
        run.note(
            "lora.quantize includes the experts; there, only with quantize_moe_experts: leave "
            "lora.quantize out for weights in bfloat16"
        )


def _model_config(run: Recipe, key: str) -> None:
    """Changes to config.json: of a router, whether its loss is added."""
    if not (changes := run.get(key)):
        return None
    mixtral, experts = (form.search(_name(run)) for form in (MIXTRAL, EXPERTS))
    other = experts and not mixtral
    if not isinstance(changes, dict) or {*changes} != {ROUTER} or other:
        return run.refuse(key, "the model is loaded as it is stored")
    if not mixtral:
        run.no_effect[key] = f"{ROUTER} is of mixtures of experts, and base_model is none"
    elif run.task == "reward":
        run.no_effect[key] = f"{ROUTER} changes no loss of a model that scores"
    elif not changes[ROUTER]:
        run.no_effect[key] = f"{ROUTER} is false here, too"
    elif run.task == "dpo":
        run.refuse(key, f"{ROUTER} adds a loss that balances the experts, here to SFT alone")
    else:
        run.options["sft.router_aux_loss"] = True
        run.note(
            f"{ROUTER}: the loss that balances the experts is of each example, weighted by its "
            "tokens, and there of a micro-batch; its weight is router_aux_loss_coef of config.json"
        )


def _name(run: Recipe) -> str:
    return str(run.options.get("model.name_or_path", ""))


def _of_text_model(run: Recipe, pattern: str) -> None:
    """The layers of a pattern for a model for images and text, by their names in its text model."""
    form = OF_TEXT_MODEL.fullmatch(pattern.replace("\\", "").replace("[d]", "d"))
    parts, names = ({*group.split("|")} for group in form.groups()) if form else (set(), set())
    if not (parts >= {"mlp", "self_attn"} and names <= LINEAR) or "processor_type" in run.refused:
        why = "names parts of a model for images; EasyAira has none"
        return run.refuse("lora_target_modules", why)
    run.facts["lora_target_modules"] = [f"{name}_proj" for name in form[2].split("|")]
    run.note(
        "lora.target_modules are of the text model: take it out first, and name its folder in "
        "model.name_or_path (easyaira convert text_model)"
    )


AXOLOTL = Source(
    name="axolotl 0.19",
    tables={"sft": COMMON | SFT, "dpo": COMMON | DPO, "reward": COMMON | REWARD},
    defaults={task: DEFAULTS for task in ("sft", "dpo", "reward")},
    differences={"sft": (ORDER, DROPOUT), "dpo": (ORDER,), "reward": (ORDER,)},
    telling={
        "rl": dict.fromkeys(("dpo", "ipo", "simpo", "orpo", "kto"), "dpo"),
        "reward_model": {True: "reward"},
    },
    otherwise="sft",
    prepare=facts,
)
