"""Tiny models, tokenizers and data sets, with weights large enough to expose mistakes (std 0.2)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from easyaira.distributed.mesh import make_mesh
from easyaira.hf import transfer
from easyaira.models.registry import model_of
from easyaira.storage.pretrained import find

if TYPE_CHECKING:  # imported lazily: they take seconds, and many tests need none of them
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).parents[3] / "shared" / "data"  # real data and models, if available

VOCAB = 300
CONFIGS = {
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "opt": {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
}
_GEMMA = CONFIGS["llama"] | {
    "head_dim": 8,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 6,
    "sliding_window": 4,
    "rms_norm_eps": 1e-2,
    "tie_word_embeddings": True,
}
_NEOX = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CASES = {  # variants of the architectures
    "gpt2": CONFIGS["gpt2"],
    "gpt2-untied-relu": CONFIGS["gpt2"]
    | {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 40},
    "gpt2-eps-erf": CONFIGS["gpt2"] | {"layer_norm_epsilon": 1e-2, "activation_function": "gelu"},
    "llama": CONFIGS["llama"],
    "llama-tied-mha": CONFIGS["llama"] | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama-theta-eps-head": CONFIGS["llama"]
    | {"rope_theta": 500.0, "rms_norm_eps": 1e-2, "head_dim": 8, "num_key_value_heads": 1},
    "llama-3.1": CONFIGS["llama"]
    | {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": CONFIGS["llama"]
    | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 5,
        "rope_theta": 500.0,
    },
    "mixtral": CONFIGS["llama"]
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "sliding_window": 5,
        "rms_norm_eps": 1e-2,
    },
    "mixtral-tied-one-of-three": CONFIGS["llama"]
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "rope_theta": 500.0,
    },
    "qwen2": CONFIGS["llama"]
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "qwen3": CONFIGS["llama"]
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 8,
        "rms_norm_eps": 1e-2,
    },
    "gemma2": _GEMMA
    | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "rope_theta": 500.0,
    },
    "gemma3": _GEMMA
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": False,
    },
    "olmo2": CONFIGS["llama"]
    | {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": True,
        "rms_norm_eps": 1e-2,
        "rope_theta": 500.0,
    },
    "smollm3": CONFIGS["llama"]
    | {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 1],
        "attention_bias": True,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "pad_token_id": 1,
    },
    "gpt_neox": _NEOX
    | {
        "num_attention_heads": 2,
        "rotary_pct": 0.5,
        "rotary_emb_base": 500,
        "layer_norm_eps": 1e-2,
    },
    "gpt_neox-in-turn": _NEOX
    | {
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rotary_pct": 1.0,
        "hidden_act": "gelu_new",
    },
    "bloom": {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": VOCAB,
        "n_embed": 24,
        "n_layer": 2,
        "num_attention_heads": 6,
        "seq_length": 64,
        "layer_norm_epsilon": 1e-2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "opt": CONFIGS["opt"],
    "opt-350m": CONFIGS["opt"]
    | {"do_layer_norm_before": False, "word_embed_proj_dim": 8, "activation_function": "gelu"},
}

_KINDS = "mistral mixtral qwen2 qwen3 gemma2 gemma3 olmo2 smollm3 gpt_neox bloom".split()
FAMILIES = {kind: CASES[kind] for kind in _KINDS}
# One case of each way to place and mask tokens: learned, rotary, rotary in part, in some layers or
# none, biased by distance, within windows. The attention of the other cases is that of llama.
ATTENTION = "gpt2 opt llama mistral gemma3 smollm3 gpt_neox bloom".split()

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
}
SCORERS = {
    "bert": _ENCODER
    | {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "pad_token_id": 0,
    },
    "roberta": _ENCODER
    | {
        "model_type": "roberta",
        "architectures": ["RobertaForSequenceClassification"],
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    },
    **{
        kind: CONFIGS[kind]
        | {"architectures": [f"{name}ForSequenceClassification"], "pad_token_id": 1}
        for kind, name in {"gpt2": "GPT2", "llama": "Llama", "opt": "OPT"}.items()
    },
}
_ONE_LABEL = {"id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}}
SCORERS = {kind: config | _ONE_LABEL for kind, config in SCORERS.items()}


def scorer(config: dict) -> dict:
    """The scorer of a language model's architecture."""
    name = re.sub("ForCausalLM|LMHeadModel", "", config["architectures"][0])
    name += "ForSequenceClassification"
    return config | {"architectures": [name], "pad_token_id": 1} | _ONE_LABEL


def torch_model(config: dict, std: float = 0.2, seed: int = 0) -> torch.nn.Module:
    """Transformers model of a config, with all weights drawn from N(0, std)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    settings = {k: v for k, v in config.items() if k != "architectures"}
    scores = config.get("architectures", [""])[0].endswith("ForSequenceClassification")
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = auto.from_config(AutoConfig.for_model(**settings), **eager)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, std)
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(name.endswith("weight"))
    return model.eval()


def as_stored(model: torch.nn.Module, tensors: Mapping) -> dict:
    """A transformers model's tensors, or their gradients, with each expert by itself and under the
    names of its files, if it has experts."""
    from transformers.core_model_loading import revert_weight_conversion

    if not any(".experts." in name for name in tensors):
        return dict(tensors)
    return dict(revert_weight_conversion(model, dict(tensors)))


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients of a transformers model, by the names of its files; 0 where there is none."""
    grads = {n: 0 * p.data if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {name: grad.numpy() for name, grad in as_stored(model, grads).items()}


def save(folder: Path, config: dict, *, std: float = 0.2, dtype=None, **kwargs) -> torch.nn.Module:
    """Write a Hugging Face folder with random weights and a tokenizer; return the model."""
    model = torch_model(config, std)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, **kwargs)
    tokenizer_of(config).save_pretrained(folder)
    return model


def save_config(folder: Path, config: dict) -> None:
    """Write a folder with config.json and a tokenizer, but no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_of(config).save_pretrained(folder)


def ground(root: Path, models: Mapping = {}, bare: Mapping = {}, **rows: list[dict]) -> Path:
    """Fill a folder with models by name (`bare` ones without weights) and files NAME.jsonl."""
    for name, config in models.items():
        save(root / name, config)
    for name, config in bare.items():
        save_config(root / name, config)
    for name, lines in rows.items():
        write_rows(root / f"{name}.jsonl", lines)
    return root


def tokenizer_of(config: dict) -> PreTrainedTokenizerFast:
    """Usual kind of tokenizer for an architecture."""
    if config["model_type"] in FRAMES and config["pad_token_id"] < 2:
        return encoder_tokenizer(config)
    return tokenizer(config["vocab_size"])


def starting_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `tokenizer`, which puts a start token first."""
    from tokenizers import processors

    starting = tokenizer()
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return starting


def tokenizer(vocab_size: int = VOCAB, pad: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with id 0 for `<|endoftext|>` and id 1 for `pad`, if given."""
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(vocab_size, [end, pad] if pad else [end]),
        pad_token=pad,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        model_max_length=64,
    )


FRAMES = {  # pad, first and last token of a text; pad is at its usual id
    "bert": ["[PAD]", "[CLS]", "[SEP]"],
    "roberta": ["<s>", "<pad>", "</s>"],
}


def encoder_tokenizer(config: dict) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer that frames a text as BERT or RoBERTa do."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    controls = FRAMES[config["model_type"]]
    trained = _trained(config["vocab_size"], controls)
    pad = config["pad_token_id"]
    first, last = (token for i, token in enumerate(controls) if i != pad)
    trained.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(token, controls.index(token)) for token in (first, last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        cls_token=first,
        sep_token=last,
        pad_token=controls[pad],
        model_max_length=64,
    )


def _trained(vocab_size: int, controls: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=controls,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words = "the capital of France is Paris. what do you like? I like red and blue. yes no".split()
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    trained.train_from_iterator(texts, trainer)
    return trained


def load(folder: Path, mesh: str = "fsdp=-1"):
    """Load (model, float32 params) of a Hugging Face folder."""
    origin = find(str(folder))
    model = model_of(origin.config, str(folder))
    return model, origin.load(model, make_mesh(mesh))


def loaded_once(tmp_path_factory, cases: Mapping[str, dict]) -> Callable[[str], tuple]:
    """Function of a case's name: transformers' model, ours, and its parameters, loaded once."""

    @cache
    def loaded(case):
        folder = tmp_path_factory.mktemp("model")
        return save(folder, cases[case]), *load(folder)

    return loaded


def as_theirs(model, tree) -> dict[str, np.ndarray]:
    """Rename a tree of parameters, or of gradients, to Hugging Face's names."""
    dtype = lambda name: jnp.dtype("float32")  # noqa: E731
    return dict(transfer.to_hf(tree, model.rows, vocab_size=model.vocab_size, dtypes=dtype))


def layout(tokens, *, segment_ids=None, sides=None, positions=None) -> dict:
    """A batch of rows; by default each row is one sequence."""
    tokens, shape = jnp.asarray(tokens), np.shape(tokens)
    places = np.broadcast_to(np.arange(shape[1]), shape) if positions is None else positions
    segments = np.ones(shape, int) if segment_ids is None else segment_ids
    sides = np.zeros(shape, int) if sides is None else sides
    others = {"positions": places, "segment_ids": segments, "sides": sides}
    return {"tokens": tokens} | {name: jnp.asarray(of) for name, of in others.items()}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft_rows(count: int, seed: int = 0) -> list[dict]:
    """Questions with answers of uneven lengths, no question twice."""
    rng = np.random.default_rng(seed)
    answers = ["yes", "no, I like blue", "the capital of France is Paris", "red and blue and red"]
    return [
        {"prompt": f"what do you like {i}?", "completion": " " + answers[rng.integers(4)]}
        for i in range(count)
    ]


def dpo_rows(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    good = ["yes", "yes, I like red", "I like Paris and blue and red"]
    bad = ["no", "no, no", "the capital of France is no"]
    return [
        {
            "prompt": f"what do you like {i}?",
            "chosen": " " + good[rng.integers(3)],
            "rejected": " " + bad[rng.integers(3)],
        }
        for i in range(count)
    ]


def ranked_rows(count: int, seed: int = 0) -> list[dict]:
    """Two to four answers with scores, some of them tied, worst first: of the same texts, the same
    are better."""
    rng = np.random.default_rng(seed)
    texts = ["no", "no, no", "yes, I like red", "I like Paris and blue and red", "yes"]
    rows = []
    for i in range(count):
        order = np.sort(rng.permutation(len(texts))[: 2 + i % 3])
        scores = sorted([1.0, 2.5, *rng.integers(0, 4, i % 3).tolist()])
        answers = [" " + texts[n] for n in order]
        rows.append({"prompt": f"what do you like {i}?", "answers": answers, "scores": scores})
    return rows


def weighted_rows(count: int) -> list[dict]:
    """Pairs, of which two in three have a margin and three in four a weight."""
    numbers = [((None, 0.2, 0.7)[i % 3], (None, 0.5, 2, 0)[i % 4]) for i in range(count)]
    return [
        row | {"margin": margin, "weight": weight}
        for row, (margin, weight) in zip(dpo_rows(count), numbers, strict=True)
    ]


def rated_rows(count: int) -> list[dict]:
    """Answers to unlike questions, with a label: three in five are good."""
    asked = ("what do you like", "the capital of France is Paris and", "no, no, red and blue and")
    return [
        {"prompt": f"{asked[i % 3]} {i}?", "completion": row["completion"], "label": i % 5 < 3}
        for i, row in enumerate(sft_rows(count))
    ]


def label_rows(count: int, seed: int = 0) -> list[dict]:
    """Texts with labels: 1 for those that say no, 0 for the rest."""
    rng = np.random.default_rng(seed)
    words = [["no", "no, no", "I like no Paris"], ["yes", "I like red", "the capital"]]
    labels = [int(i % 3 == 0) for i in range(count)]
    return [
        {"text": f"{words[1 - label][rng.integers(3)]} and {i}", "label": label}
        for i, label in enumerate(labels)
    ]
