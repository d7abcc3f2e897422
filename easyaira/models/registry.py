"""Registry of architectures by Hugging Face's `model_type`, and models built from config.json.

To add an architecture, write a file in this folder with a config, a backbone, PARTITION_RULES and
HF_ROWS, and add a line to MODELS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, get_type_hints

import flax.linen as nn

from easyaira.errors import ConfigError, shortened
from easyaira.models import (
    bert,
    bloom,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    qwen2,
    qwen3,
    roberta,
    smollm3,
)
from easyaira.models.heads import LAST_TOKEN
from easyaira.models.layers import ACTIVATIONS, Compute, RopeScaling
from easyaira.models.model import SCORER_CLASS, Architecture, Model


def _architecture(module: Any, config: type, backbone: type[nn.Module]) -> Architecture:
    return Architecture(
        config,
        backbone,
        module.PARTITION_RULES,
        module.HF_ROWS,
        module.HF_PREFIX,
        module.HF_IGNORED,
        module.HF_NEUTRAL,
        getattr(module, "SCORE_HEAD", LAST_TOKEN),
        getattr(module, "HF_RENAMED", {}),
        getattr(module, "HF_SAVED", {}),
        getattr(module, "HF_ALIASES", {}),
        getattr(module, "easylm_rows", None),
    )


LLAMA = _architecture(llama, llama.LlamaConfig, llama.Llama)


def _like_llama(module: Any, config: type, backbone: type[nn.Module]) -> Architecture:
    """An architecture with Llama's tables; rows and rules that do not apply are left out."""
    neutral = module.HF_NEUTRAL
    return replace(LLAMA, config=config, backbone=backbone, neutral=neutral, easylm_rows=None)


MODELS = {
    "bert": _architecture(bert, bert.BertConfig, bert.Bert),
    "bloom": _architecture(bloom, bloom.BloomConfig, bloom.Bloom),
    "gemma2": _like_llama(gemma2, gemma2.Gemma2Config, gemma2.Gemma2),
    "gemma3_text": _like_llama(gemma3, gemma3.Gemma3TextConfig, gemma3.Gemma3),
    "gpt2": _architecture(gpt2, gpt2.GPT2Config, gpt2.GPT2),
    "gpt_neox": _architecture(gpt_neox, gpt_neox.GPTNeoXConfig, gpt_neox.GPTNeoX),
    "llama": LLAMA,
    "mistral": _like_llama(mistral, mistral.MistralConfig, mistral.Mistral),
    "mixtral": _architecture(mixtral, mixtral.MixtralConfig, mixtral.Mixtral),
    "olmo2": _like_llama(olmo2, olmo2.Olmo2Config, olmo2.Olmo2),
    "opt": _architecture(opt, opt.OPTConfig, opt.OPT),
    "qwen2": _like_llama(qwen2, qwen2.Qwen2Config, qwen2.Qwen2),
    "qwen3": _like_llama(qwen3, qwen3.Qwen3Config, qwen3.Qwen3),
    "roberta": _architecture(roberta, roberta.RobertaConfig, roberta.Roberta),
    "smollm3": _like_llama(smollm3, smollm3.SmolLM3Config, smollm3.SmolLM3),
}

# config.json keys without effect on a forward pass
HARMLESS = """
    _name_or_path _num_labels architectures attention_dropout attn_pdrop bos_token_id
    chunk_size_feed_forward dtype embd_pdrop eos_token_id finetuning_task gradient_checkpointing
    id2label label2id model_type n_ctx n_special output_attentions output_hidden_states output_past
    pad_token_id predict_special_tokens pretraining_tp problem_type resid_pdrop return_dict
    rope_parameters summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tokenizer_class torch_dtype transformers_version
    unk_token_id use_cache sep_token_id do_sample early_stopping length_penalty max_length
    max_new_tokens min_length no_repeat_ngram_size num_beams num_return_sequences repetition_penalty
    temperature top_k top_p typical_p diversity_penalty num_beam_groups encoder_no_repeat_ngram_size
    is_encoder_decoder tie_encoder_decoder remove_invalid_values return_dict_in_generate
    output_scores activation_dropout dropout layerdrop prefix num_labels hidden_dropout_prob
    attention_probs_dropout_prob classifier_dropout directionality pooler_fc_size pooler_type
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head auto_map
    attn_implementation cache_implementation use_sliding_window max_window_layers unsloth_version
    unsloth_fixed is_llama_config max_sequence_length transformers.js_config
""".split()


LAYER_TYPES = ("full_attention", "sliding_attention")
BY_LAYER = {"layer_types": LAYER_TYPES, "no_rope_layers": (0, 1)}  # lists of config.json
MOST_EXPERTS = 256  # each is compiled by itself
IN_FLOAT32 = Compute()


def model_of(
    raw: Mapping[str, Any],
    where: str,
    compute: Compute = IN_FLOAT32,
    *,
    scorer: bool | None = None,
) -> Model:
    """The model that a Hugging Face config.json describes.

    Args:
        raw: content of config.json.
        where: path of config.json, for messages.
        compute: how to compute the model.
        scorer: true: a scorer; false: a language model; None: as `architectures` in config.json.

    Raises:
        ConfigError: an unsupported architecture or feature, or invalid sizes.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        if _writes(_object(raw, "text_config", where).get("model_type")):
            raise ConfigError(
                f"{where}: holds a model for more than text, model_type {kind!r:.80}; take its "
                f"text model out: easyaira convert text_model {where} OUT"
            )
        raise ConfigError(
            f"{where}: model_type {kind!r:.80} is not supported; choose one of {', '.join(MODELS)}"
        )
    architecture = MODELS[kind]
    names = {field.name for field in fields(architecture.config)}
    aliases = architecture.aliases
    values = {key: value for key, value in raw.items() if key not in aliases}
    values |= {name: raw[key] for key, name in aliases.items() if raw.get(key) is not None}
    values |= _rope(raw, architecture.config, where)
    if "partial_rotary_factor" not in names and values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    # some families have this switch; others ignore it
    switched = {"use_sliding_window", "sliding_window"} & architecture.neutral.keys()
    if switched and values.get("use_sliding_window") is False:
        values["sliding_window"] = None
    kinds = _listed(raw, "layer_types", where)
    if "layer_types" not in names and all(kind == "full_attention" for kind in kinds):
        values["layer_types"] = None
    for name in BY_LAYER.keys() & names:
        values[name] = tuple(_listed(raw, name, where)) or None
    _check_types(values, architecture.config, where)
    for key, value in values.items():
        if key.startswith("_"):
            continue  # transformers' own notes
        if key in architecture.neutral and value not in (None, architecture.neutral[key]):
            raise ConfigError(
                f"{where}: {key}: {value} is not supported; only {architecture.neutral[key]}"
            )
        known = key in names or key in architecture.neutral or key in HARMLESS
        if not known and value not in (None, False, 0, [], {}, ""):
            raise ConfigError(
                f"{where}: {key} is unknown, and {value!r} may change the numbers; if you are sure "
                "that it does not, remove it from config.json"
            )
    config = architecture.config(**{k: v for k, v in values.items() if k in names})
    _check_sizes(config, where)
    stored_scorer = str((_listed(raw, "architectures", where) or [""])[0]).endswith(SCORER_CLASS)
    if stored_scorer and (labels := _labels(raw)) != 1:
        raise ConfigError(
            f"{where}: has {labels} labels; only a score (1 label) is supported; name a "
            "model that has one"
        )
    if architecture.encoder and scorer is False:
        raise ConfigError(
            f"{where}: {kind} is an encoder and generates no text; train_reward makes it a scorer"
        )
    if stored_scorer and scorer is False:
        raise ConfigError(
            f"{where}: is a reward or toxicity model and generates no text; name a language model"
        )
    if scorer is None:
        scorer = stored_scorer or architecture.encoder
    return Model(architecture, config, compute, scorer)


def _writes(kind: Any) -> bool:
    """Whether a model_type is that of a supported language model."""
    return isinstance(kind, str) and kind in MODELS and not MODELS[kind].encoder


def _labels(raw: Mapping[str, Any]) -> int:
    """Number of labels that transformers gives a classifier with this config.json."""
    labels = raw.get("id2label")
    return len(labels) if labels and isinstance(labels, Mapping) else raw.get("num_labels", 2)


def _listed(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = raw.get(key) or []
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {key} is {value!r}; expected a list")
    return value


def _check_types(values: Mapping[str, Any], config: type, where: str) -> None:
    """Refuse sizes and options of another type than the configuration's."""
    for name, kind in get_type_hints(config).items():
        value = values.get(name)
        # JSON writes 1.0 as 1; true is not a number
        right = isinstance(value, kind) or (kind is float and type(value) is int)
        if name in values and (not right or (isinstance(value, bool) and kind is not bool)):
            wanted = getattr(kind, "__name__", str(kind))
            raise ConfigError(f"{where}: {name} is {shortened(repr(value))}; expected {wanted}")


def _rope(raw: Mapping[str, Any], config: type, where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config.json, which may stand under `rope_parameters`.

    If `config` has `rope_local_base_freq`, `rope_parameters` has an entry for layers with full
    attention, and one for layers with a window, whose theta becomes `rope_local_base_freq`."""
    by_kind = hasattr(config, "rope_local_base_freq")
    scaling, given = (_object(raw, key, where) for key in ("rope_scaling", "rope_parameters"))
    if given and bool(given.keys() & set(LAYER_TYPES)) != by_kind:
        raise ConfigError(
            f"{where}: rope_parameters has {', '.join(map(str, given))}; expected "
            f"{' and '.join(LAYER_TYPES) if by_kind else 'rope_theta and rope_type'}"
        )
    if not by_kind:
        top = {"rope_theta": raw.get("rope_theta", getattr(config, "rope_theta", None))}
        kinds = [top | _rope_of(entry, where) for entry in (scaling, given) if entry]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            raise ConfigError(
                f"{where}: rope_scaling and rope_parameters contradict each other, and "
                "transformers follows rope_scaling; leave one out"
            )
        return _rope_of(given or scaling, where)
    full, window = (_object(given, kind, where) for kind in LAYER_TYPES)
    local = _rope_of(window, where)
    if local.get("rope_scaling") is not None:
        raise ConfigError(
            f"{where}: rope_type {local['rope_scaling'].rope_type!r} is not supported in layers "
            "with a window; choose default"
        )
    theta = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    return _rope_of({**full, **scaling}, where) | theta


def _object(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} is {value!r}; expected an object")
    return value


def _rope_of(rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of one entry."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return theta | ({"rope_scaling": None} if rope else {})
    needed = {"linear": ("factor",), "llama3": tuple(f.name for f in fields(RopeScaling)[1:])}
    if kind not in needed:
        raise ConfigError(
            f"{where}: rope_type {kind!r} is not supported; choose one of default, linear, llama3"
        )
    values = {name: rope.get(name) for name in needed[kind]}
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 < value < 2**31:
            raise ConfigError(f"{where}: {name} of {kind} is {value!r}; expected a positive number")
    scaling = RopeScaling(kind, **values)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(
            f"{where}: low_freq_factor {scaling.low_freq_factor} is not below high_freq_factor "
            f"{scaling.high_freq_factor}; correct them"
        )
    return theta | {"rope_scaling": scaling}


def _check_sizes(config: Any, where: str) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"{where}: {field.name} is {value}; it must be at least 1")
    experts = getattr(config, "num_local_experts", 1)
    if not getattr(config, "num_experts_per_tok", 1) <= experts <= MOST_EXPERTS:
        raise ConfigError(
            f"{where}: num_local_experts is {experts}; it must be from num_experts_per_tok "
            f"{config.num_experts_per_tok} to {MOST_EXPERTS}"
        )
    for name, known in BY_LAYER.items():
        kinds = getattr(config, name, None)
        if kinds and (
            len(kinds) != config.num_hidden_layers or any(kind not in known for kind in kinds)
        ):
            raise ConfigError(
                f"{where}: {name} must hold {' or '.join(map(str, known))} for each of "
                f"{config.num_hidden_layers} layers; correct it"
            )
    if config.activation not in ACTIVATIONS:
        raise ConfigError(
            f"{where}: activation {config.activation!r} is not supported; choose one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    if config.width % config.heads and not getattr(config, "head_dim", None):
        raise ConfigError(
            f"{where}: width {config.width} is not a multiple of {config.heads} heads"
        )
    if getattr(config, "rotated", 2) % 2 or not getattr(config, "rotated", 2):
        raise ConfigError(
            f"{where}: {config.rotated} features of a head are rotated; it must be an even number "
            "above 0"
        )
    if config.heads % config.kv_heads:
        raise ConfigError(
            f"{where}: {config.heads} heads are not a multiple of {config.kv_heads} key/value heads"
        )
