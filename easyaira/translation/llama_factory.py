"""Keys of LLaMA-Factory (2024 to 2026): its own beside those of transformers' trainer."""

from __future__ import annotations

from easyaira.translation.recipe import Recipe
from easyaira.translation.trl import TRAINING, UNSMOOTHED
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
    **TRAINING,
    **same("""
        model_name_or_path model.name_or_path
        adapter_name_or_path lora.adapter
        max_samples data.max_examples
    """),
    **computed("""
        model_revision finetuning_type lora_rank=lora_r lora_alpha lora_dropout use_rslora
        additional_target=modules_to_save
        use_dora lora_target quantization_bit pure_bf16=bf16 infer_dtype=dtype
        dataset=dataset_names eval_dataset=held_out_names template cutoff_len=max_length
        val_size=test_split_size mask_history train_on_prompt packing neat_packing
        use_dft_loss use_muon disable_shuffling=in_order
    """),
    **no_effect(
        "says how PyTorch computes, and not what",
        "flash_attn enable_liger_kernel use_unsloth use_unsloth_gc upcast_layernorm "
        "upcast_lmhead_output disable_gradient_checkpointing low_cpu_mem_usage "
        "double_quantization quantization_type quantization_device_map cache_dir "
        "preprocessing_batch_size use_fast_tokenizer buffer_size tokenized_path overwrite_cache "
        "cutoff_strategy ray_run_name ray_num_workers ray_storage_path resources_per_worker "
        "placement_strategy",
    ),
    **no_effect(
        "the log and the report are EasyAira's own",
        "plot_loss use_swanlab swanlab_project swanlab_run_name swanlab_mode "
        "include_effective_tokens_per_second include_num_input_tokens_seen compute_accuracy",
    ),
    **no_effect(
        "dataset_info.json is not read; name the file or hub id of each data set", "dataset_dir"
    ),
    **no_effect("the run uploads nothing", "hf_hub_token ms_hub_token om_hub_token "
                "export_hub_model_id"),
    **unsupported("is no loss of EasyAira", "use_asft_loss use_eaft_loss"),
    **unsupported("the model is loaded as it is stored", "resize_vocab new_special_tokens "
                  "add_tokens add_special_tokens rope_scaling shift_attn mixture_of_depths "
                  "visual_inputs image_max_pixels video_max_pixels freeze_vision_tower "
                  "freeze_multi_modal_projector"),
    **unsupported("only sft.router_aux_loss adds this loss, with the weight of config.json",
                  "moe_aux_loss_coef"),
    **unsupported("adapters are LoRA or DoRA on linear layers", "loraplus_lr_ratio "
                  "pissa_init pissa_convert create_new_adapter pissa_iter"),
    **unsupported("the optimizers are AdamW and Muon over all trainable weights", "use_galore "
                  "galore_layerwise galore_target galore_rank galore_update_interval "
                  "galore_scale use_apollo "
                  "apollo_layerwise apollo_target apollo_rank apollo_scale apollo_update_interval "
                  "apollo_scale_type use_badam badam_mode badam_switch_mode badam_switch_interval "
                  "badam_verbose badam_start_block use_adam_mini use_llama_pro "
                  "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules fp8 "
                  "fp8_backend"),
    **unsupported("sets of data are used whole", "mix_strategy interleave_probs",
                  (None, "concat")),
    "stage": Unsupported("is no stage that is translated", (None, "dpo", "rm")),
    **UNSMOOTHED,
    "quantization_method": Unsupported("4 bits are nf4", (None, "bnb", "bitsandbytes")),
    "enable_thinking": Unsupported("the template is rendered without arguments", (None, True)),
}  # fmt: skip

SFT: Table = computed("label_smoothing_factor stage")
DPO: Table = {
    **same("""
        pref_beta dpo.beta
        dpo_beta dpo.beta
        pref_ftx dpo.sft_weight
        ld_alpha dpo.ld_alpha
        dpo_ftx dpo.sft_weight
        dpo_label_smoothing dpo.label_smoothing
        simpo_gamma dpo.simpo_gamma
        ref_model model.ref_name_or_path
    """),
    **computed("""
        pref_loss=loss_type dpo_loss=loss_type stage kto_chosen_weight=desirable_weight
        kto_rejected_weight=undesirable_weight
    """),
    **unsupported("is no loss of EasyAira", "pref_bco_weight"),
}

DEFAULTS = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "cutoff_len": 2048,
    "lora_rank": 8,
    "lora_target": "all",
    "finetuning_type": "lora",
    "save_steps": 500,
    "gradient_checkpointing": True,
    "train_on_prompt": False,
}
ORDER = "the order of rows follows from the seed, by another generator"


def facts(run: Recipe) -> None:
    """Facts by transformers' names from LLaMA-Factory's own."""
    kind = run.get("finetuning_type")
    run.facts["use_peft"] = kind == "lora"
    if kind not in ("lora", "full"):
        run.refuse("finetuning_type", f"{kind} has no translation")
    targets = run.get("lora_target")
    run.facts["lora_target_modules"] = (
        "all-linear" if targets == "all" else
        [name.strip() for name in targets.split(",")] if isinstance(targets, str) else targets
    )  # fmt: skip
    run.facts.setdefault("lora_alpha", 2 * run.get("lora_r", 8))
    if run.get("use_muon"):
        run.options["optimizer.name"] = "muon"
        run.facts["optim"] = "adamw"  # use_muon takes precedence
        run.note(
            "Muon trains the matrices of layers, and in LLaMA-Factory a score head, too; norms and "
            "biases do not decay here; Newton-Schulz is computed in float32, there in bfloat16"
        )
        if kind == "lora":
            run.refuse("use_muon", "adapters are trained by AdamW")
    if bits := run.get("quantization_bit"):
        run.facts[{4: "load_in_4bit", 8: "load_in_8bit"}.get(bits, "load_in_4bit")] = True
        if bits not in (4, 8):
            run.refuse("quantization_bit", "frozen weights have 4 or 8 bits")
    run.facts["packing"] = run.get("neat_packing") or run.get("packing")
    learned = not run.get("train_on_prompt")
    run.facts["completion_only_loss"] = run.facts["assistant_only_loss"] = learned
    if run.task == "sft" and run.get("use_dft_loss"):
        run.facts["loss_type"] = "dft"
    if run.task == "sft" and run.get("mask_history"):
        run.options["sft.last_turn_only"] = True
    stage = run.get("stage", "sft" if run.task == "sft" else "dpo")
    if run.task == "sft":
        _texts(run, stage)
    elif stage == "kto":  # which does not read pref_loss
        run.facts["loss_type"] = "kto"
    elif stage != "dpo":
        run.refuse("stage", f"{stage} is no stage of pairs or of rated answers")
    else:  # the other stages do not read them
        run.facts |= {"desirable_weight": None, "undesirable_weight": None}
    loss = run.get("loss_type", "sigmoid")
    if loss in ("orpo", "simpo"):
        run.options["dpo.reference"] = "none"
        if loss == "orpo":  # beside the likelihood, in its trainer, too
            run.options["dpo.sft_weight"] = 1.0
    elif loss == "kto_pair":
        run.refuse("loss_type", "kto_pair takes pairs; kto is of rated answers")
    if run.get("texts"):
        run.facts["chat_template"] = "plain"
    elif run.get("template") not in (None, "default", "empty"):
        run.note(f"data.template chat: the tokenizer's own, in the place of {run.get('template')}")
    else:
        run.refuse("template", "names no template of the tokenizer; set it to the model's")
    run.facts.setdefault("chat_template", "chat")
    for fact, names in (("sources", "dataset_names"), ("held_out", "held_out_names")):
        given = run.get(names, [])
        given = given.split(",") if isinstance(given, str) else given
        run.facts[fact] = [{"path": name.strip()} for name in given]
        if given:
            run.note(
                f"{'data.train' if fact == 'sources' else 'data.eval'}: a name of "
                "dataset_info.json stands where its file or hub id belongs; write that"
            )


def _texts(run: Recipe, stage: str) -> None:
    """Rows of plain text, of stage pt."""
    run.facts["texts"] = stage == "pt"
    if stage not in ("pt", "sft"):
        return run.refuse("stage", "is no stage that is translated")
    if stage == "sft":
        return None
    run.note("texts stand in the column text; map another name with columns {text: NAME}")
    if run.facts["packing"] is not False:  # LLaMA-Factory packs at this stage
        run.options["data.texts"] = "join"
        run.note(
            "each text begins with the tokenizer's start token, if any; there that takes the place "
            "of the first token of each example"
        )
        run.note(
            "all texts of a data set are joined; there those of 1,000 rows "
            "(preprocessing_batch_size), and what is left of them is dropped"
        )
    if run.get("template") == "llama3":
        run.note("a text ends with the tokenizer's end token; there with <|end_of_text|>")


LLAMA_FACTORY = Source(
    name="LLaMA-Factory",
    tables={"sft": COMMON | SFT, "dpo": COMMON | DPO, "reward": COMMON},
    defaults={
        "sft": DEFAULTS,
        "dpo": DEFAULTS | {"pref_beta": 0.1},
        "reward": DEFAULTS,
    },
    differences={"sft": (ORDER,), "dpo": (ORDER,), "reward": (ORDER,)},
    telling={"stage": {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "dpo", "rm": "reward"}},
    otherwise="sft",
    prepare=facts,
)
