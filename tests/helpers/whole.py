"""Tiny models for images, sound and text, in folders as they are published."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from helpers import tiny

_EYES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_TEXT = {
    "vocab_size": tiny.VOCAB,
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
_LLAMA = _TEXT | {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
WHOLE = {  # config.json as such models are published: what is the default is left out
    "gemma3": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "eos_token_id": [1, 106],
        "vision_config": _EYES | {"model_type": "siglip_vision_model"},
        "text_config": _TEXT
        | {
            "model_type": "gemma3_text",
            "hidden_size": 18,
            "num_attention_heads": 6,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 6,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "rope_theta": 500.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
    "mistral3": {
        "model_type": "mistral3",
        "eos_token_id": [2, 7],
        "vision_config": _EYES | {"model_type": "pixtral"},
        "text_config": _LLAMA | {"model_type": "mistral", "sliding_window": 5, "rope_theta": 500.0},
    },
    "llava_next": {
        "model_type": "llava_next",
        "eos_token_id": 2,
        "vision_config": _EYES | {"model_type": "clip_vision_model"},
        "text_config": _LLAMA,
    },
    "voxtral": {
        "model_type": "voxtral",
        "eos_token_id": 2,
        "audio_config": {
            "model_type": "voxtral_encoder",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_mel_bins": 8,
            "max_source_positions": 16,
        },
        "text_config": _LLAMA,
    },
}


def save(folder: Path, kind: str) -> None:
    """Write a folder with random weights in bfloat16, which transformers names as it is used to.

    The chat template is where older folders hold it: for the processor, not for the tokenizer."""
    torch.manual_seed(0)
    settings = WHOLE[kind]
    config = AutoConfig.for_model(**settings, tie_word_embeddings=kind == "gemma3")
    model = AutoModelForMultimodalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.2)
    model.generation_config.eos_token_id = settings["eos_token_id"]
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    files = {"config": settings, "chat_template": {"chat_template": "{{ 1 }}"}}
    for name, content in (files | {"preprocessor_config": {}}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
