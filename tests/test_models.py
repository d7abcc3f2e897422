"""Folders that people have: config.json as published, and the number of parameters it makes."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from easyaira.errors import ConfigError
from easyaira.models.bloom import alibi_slopes
from easyaira.models.registry import model_of

LLAMA = {"model_type": "llama", "hidden_act": "silu", "rope_scaling": None, "use_cache": True}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}
LLAMA_3 = {
    **LLAMA,
    **LLAMA_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "attention_bias": False,
}
ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 8192}
MISTRAL = {
    **LLAMA_7B,
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256}
QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False}
PYTHIA = {"model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": 0.25, "vocab_size": 50304}
PYTHIA |= {"rotary_emb_base": 10000, "use_parallel_residual": True, "layer_norm_eps": 1e-05}
BLOOM = {
    "model_type": "bloom",
    "num_attention_heads": 16,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "offset_alibi": 100,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
    "vocab_size": 250880,
}
PUBLISHED = {  # name: config.json, parameters
    "TinyLlama 1.1B": (
        LLAMA
        | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "pretraining_tp": 1},
        1_100_048_384,
    ),
    "Llama 1 7B": (LLAMA | LLAMA_7B | {"max_sequence_length": 2048}, 6_738_415_616),
    "Vicuna 7B": (LLAMA | LLAMA_7B | {"pad_token_id": 0}, 6_738_415_616),
    "Yi 6B": (
        LLAMA | LLAMA_7B | {"num_key_value_heads": 4, "vocab_size": 64000, "rope_theta": 5e6},
        6_061_035_520,
    ),
    "SmolLM2 135M": (
        LLAMA
        | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
        | {"tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False}
        | {"transformers.js_config": {"dtype": "q4"}},
        134_515_008,
    ),
    "Llama 3 8B": (LLAMA_3 | {"max_position_embeddings": 8192}, 8_030_261_248),
    "Llama 3.1 8B": (
        LLAMA_3 | {"max_position_embeddings": 131072, "rope_scaling": ROPE | {"factor": 8.0}},
        8_030_261_248,
    ),
    "Llama 3.2 1B": (
        LLAMA_3
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"head_dim": 64, "tie_word_embeddings": True, "rope_scaling": ROPE | {"factor": 32.0}},
        1_235_814_400,
    ),
    "Mistral 7B 0.1": (MISTRAL | {"sliding_window": 4096}, 7_241_732_096),
    "Mistral 7B 0.3": (
        MISTRAL | {"sliding_window": None, "vocab_size": 32768, "rope_theta": 1e6},
        7_248_023_552,
    ),
    "Mixtral 8x7B": (
        MISTRAL
        | {"model_type": "mixtral", "sliding_window": None, "rope_theta": 1e6}
        | {"num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.02},
        46_702_792_704,
    ),
    "Mixtral 8x22B": (
        MISTRAL
        | {"model_type": "mixtral", "sliding_window": None, "rope_theta": 1e6}
        | {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56}
        | {"num_attention_heads": 48, "num_experts_per_tok": 2, "num_local_experts": 8}
        | {"router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
        140_620_634_112,
    ),
    "Qwen2.5 0.5B": (
        QWEN
        | {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864}
        | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"vocab_size": 151936, "max_window_layers": 21, "sliding_window": 32768}
        | {"tie_word_embeddings": True, "rope_theta": 1e6},
        494_032_768,
    ),
    "Qwen2.5 7B": (
        QWEN
        | {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944}
        | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        | {"vocab_size": 152064, "sliding_window": 131072, "use_mrope": False},
        7_615_616_512,
    ),
    "Qwen3 0.6B": (
        QWEN
        | {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072}
        | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
        | {"max_window_layers": 28, "sliding_window": None, "attention_bias": False},
        596_049_920,
    ),
    "Gemma 2 2B": (
        GEMMA
        | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096}
        | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000}
        | {"cache_implementation": "hybrid", "final_logit_softcapping": 30.0},
        2_614_341_888,
    ),
    "Gemma 2 9B": (
        GEMMA
        | {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336}
        | {"num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8},
        9_241_705_984,
    ),
    "Gemma 3 1B": (
        GEMMA
        | {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912}
        | {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1}
        | {"vocab_size": 262144, "rope_theta": 1000000, "rope_local_base_freq": 10000}
        | {"rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        999_885_952,
    ),
    "OLMo 2 1B": (
        {"model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"vocab_size": 100352, "rope_theta": 500000, "rope_scaling": None},
        1_484_916_736,
    ),
    "OLMo 2 7B": (
        {"model_type": "olmo2", "vocab_size": 100352, "rms_norm_eps": 1e-6, "rope_theta": 500000},
        7_298_617_344,
    ),
    "Pythia 160M": (
        PYTHIA
        | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 12},
        162_322_944,
    ),
    "Pythia 1B": (
        PYTHIA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 8},
        1_011_781_632,
    ),
    "BLOOM 560M": (BLOOM | {"n_embed": 1024, "n_layer": 24, "seq_length": 2048}, 559_214_592),
    "BLOOM 1B7": (
        BLOOM | {"n_embed": 2048, "n_layer": 24, "pretraining_tp": 2, "n_inner": None},
        1_722_408_960,
    ),
    "SmolLM3 3B": (
        {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008}
        | {"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4}
        | {"no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "vocab_size": 128256}
        | {"layer_types": ["full_attention"] * 36, "max_window_layers": 28, "rope_theta": 5e6}
        | {"use_sliding_window": False, "sliding_window": None, "mlp_bias": False},
        3_075_098_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.slow
def test_published_configurations_have_the_published_number_of_parameters(name):
    config, parameters = PUBLISHED[name]
    assert model_of(config, name).parameter_count() == parameters


def test_smollm3_has_rotary_positions_where_transformers_has_them():
    for values in ({}, {"no_rope_layer_interval": 3}, {"no_rope_layers": [0, 1] * 18}):
        config = PUBLISHED["SmolLM3 3B"][0] | {"no_rope_layers": None} | values
        theirs = AutoConfig.for_model(**config)
        ours = model_of(config, "a test").config
        assert [1 - table for table in ours.table_of_layer] == theirs.no_rope_layers
        assert ours.rotary_tables[0][0] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", ["Gemma 2 2B", "Gemma 3 1B"])
def test_the_layers_of_a_published_configuration_are_of_the_kinds_of_transformers(name):
    config, _ = PUBLISHED[name]
    theirs = AutoConfig.for_model(**config)
    ours = model_of(config, name).config
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in ours.sliding]
    assert kinds == theirs.layer_types and len(set(kinds)) == 2
    rope = theirs.rope_parameters
    if ours.table_of_layer is None:
        assert ours.rope_theta == rope["rope_theta"]
    else:
        tables = [rope[kind]["rope_theta"] for kind in kinds]
        assert [ours.rotary_tables[i][0] for i in ours.table_of_layer] == tables


@pytest.mark.parametrize(
    "kind, values, message",
    [
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern is unknown"),
        ("gemma2", {"layer_types": ["full_attention"]}, "for each of 26 layers"),
        ("gemma3_text", {"layer_types": [["full_attention"]] * 26}, "layer_types must hold"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must hold 0 or 1 for each of 36"),
        ("smollm3", {"no_rope_layers": [2] * 36}, "no_rope_layers must hold 0 or 1"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window: True is not supported"),
        ("gpt_neox", {"rotary_pct": 0.0}, "0 features of a head are rotated; it must be an even"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "True is not supported"),
        ("bloom", {"offset_alibi": 50}, "offset_alibi: 50 is not supported; only 100"),
        ("gemma2", {"hidden_act": "relu"}, "hidden_act: relu is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention: True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "50.0 is not supported; only None"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5}}, "expected full_attention and slid"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
            "'linear' is not supported in layers with a window",
        ),
    ],
)
def test_what_a_family_does_not_have_is_refused(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        model_of({"model_type": kind} | values, "a test")


@pytest.mark.parametrize("heads", [1, 6, 8, 12, 16, 20])
def test_the_slopes_of_bloom_are_those_of_transformers(heads):
    theirs = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(alibi_slopes(heads), theirs, rtol=1e-6)


def test_other_names_of_an_option_are_understood_as_transformers_does():
    neox = model_of(PUBLISHED["Pythia 1B"][0] | {"rotary_pct": 0.5}, "a test").config
    assert neox.rotated == 128 and neox.rope_theta == 10000
    saved = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
    neox = model_of({"model_type": "gpt_neox", "rope_parameters": saved}, "a test").config
    assert neox.rotated == 96 and neox.rope_theta == 500
    bloom = model_of(PUBLISHED["BLOOM 1B7"][0], "a test").config
    assert (bloom.hidden_size, bloom.n_head, bloom.max_positions) == (2048, 16, 2048)
    rope = {"rope_theta": 5.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    with pytest.raises(ConfigError, match="partial_rotary_factor is unknown"):
        model_of({"model_type": "llama", "rope_parameters": rope}, "a test")


def test_rotary_positions_that_are_written_twice_must_agree():
    """People add rope_scaling to the config.json of a model whose rope_parameters they overlook."""
    given = {"rope_type": "default", "rope_theta": 1e6}
    for scaling in ({"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}):
        raw = {"model_type": "qwen3", "rope_parameters": given, "rope_scaling": scaling}
        with pytest.raises(ConfigError, match="rope_(scaling and rope_parameters|type 'yarn')"):
            model_of(raw, "a test")
    linear = {"rope_type": "linear", "factor": 2.0}
    both = {"rope_parameters": linear | {"rope_theta": 1e6}, "rope_scaling": linear}
    config = model_of({"model_type": "qwen3", "rope_theta": 1e6} | both, "a test").config
    assert (config.rope_theta, config.rope_scaling.factor) == (1e6, 2.0)
    with pytest.raises(ConfigError, match="contradict each other"):  # whose theta counts
        model_of({"model_type": "qwen3"} | both, "a test")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_of_qwen_are_refused_also_where_only_the_switch_is_written(kind):
    """transformers then takes a window of 4096 for the upper layers."""
    config = {"model_type": kind, "use_sliding_window": True, "max_window_layers": 1}
    with pytest.raises(ConfigError, match="use_sliding_window: True is not supported"):
        model_of(config, "a test")
    model_of(config | {"use_sliding_window": False, "sliding_window": 4096}, "a test")


def test_interleaved_rotary_positions_are_refused():
    with pytest.raises(ConfigError, match="rope_interleaved: True is not supported"):
        model_of({"model_type": "llama", "rope_interleaved": True}, "a test")
