"""Adapters that peft makes."""

import torch
from transformers import AutoModelForCausalLM

from helpers import tiny

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "o_proj", "down_proj"],
    "opt": ["q_proj", "v_proj", "fc1", "out_proj"],
}
TARGETS |= dict.fromkeys(tiny.FAMILIES, TARGETS["llama"])
TARGETS["mixtral"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS |= dict.fromkeys(("gpt_neox", "bloom"), ["query_key_value", "dense", "dense_4h_to_h"])


def peft_model(folder, kind, *, size=None, **options):
    """peft's adapter on transformers' model, with random matrices.

    `size` resizes the vocabulary first."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], **options}
    config = PeftConfig(task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", **settings)
    base = AutoModelForCausalLM.from_pretrained(folder)
    if size:
        base.resize_token_embeddings(size)
    model = get_peft_model(base, config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "trainable_tokens", "modules_to_save")):
            parameter.data.normal_(0, 0.2)
    return model.eval()
