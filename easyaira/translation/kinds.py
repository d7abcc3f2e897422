"""Kinds of values that a translation computes with. Our command's own parser checks the others."""

from __future__ import annotations

from typing import Any

import yaml

NUMBERS = frozenset(
    """
    gradient_accumulation_steps warmup_steps warmup_ratio cosine_min_lr_ratio max_grad_norm
    logging_steps eval_steps save_steps save_total_limit test_split_size early_stopping_patience
    max_length lora_r lora_alpha lora_dropout evals_per_epoch saves_per_epoch label_smoothing
    label_smoothing_factor quantization_bit batch_size accumulate end_lr gamma_beta_ratio cpo_alpha
    desirable_weight undesirable_weight min_sample_len optimizer.learning_rate dpo.beta
    optimizer.weight_decay data.max_examples
    """.split()
)
TEXTS = frozenset(
    "dtype eos_token dataset_name dataset_text_field path split kind stage template chat_template "
    "fields packing_strategy model_size "
    "lr_scheduler_type optim output_dir".split()
)
NAMES = frozenset("report_to dataset_names held_out_names dataset_splits modules_to_save".split())
MAPPINGS = frozenset("lr_scheduler_kwargs special_tokens dataset_mixture".split())
SOURCES = frozenset("datasets axolotl_datasets axolotl_held_out axolotl_texts".split())


def fitting(name: str, value: Any) -> Any:
    """The value of a fact or option; a number or mapping in quotes is read.

    Raises:
        ValueError: it is of another kind; says which one is wanted.
    """
    if value is None:
        return value
    if isinstance(value, str) and name in NUMBERS | MAPPINGS:
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            pass
    if name in NUMBERS and not isinstance(value, int | float):
        raise ValueError(f"wanted a number, found {value!r}")
    if name in TEXTS and not isinstance(value, str):
        raise ValueError(f"wanted text, found {value!r}")
    if name in MAPPINGS and not isinstance(value, dict):
        raise ValueError(f"wanted a mapping, found {value!r}")
    if name in NAMES and not _all(value, str) and not isinstance(value, str):
        raise ValueError(f"wanted a list of names, found {value!r}")
    if name in SOURCES and not _all(value, dict):
        raise ValueError(f"wanted a list of mappings, found {value!r}")
    return value


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
