"""Options of the model and its adapters.

The string below an option is its `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from easyaira.config.ranges import Count, CountOrZero, Positive, Share


@dataclass(frozen=True)
class ModelConfig:
    """The model to train."""

    name_or_path: str
    """Hugging Face folder, hub id (owner/name), or EasyAira run folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the run folder records the resolved commit."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: read only config.json and initialise the weights as Hugging Face does."""
    resize: Literal["mean", "normal"] | None = None
    """Resize the embedding to the tokenizer's size. mean: new rows are the mean of the old ones;
    normal: new rows are drawn with the model's own standard deviation, as for Aira's originals. By
    default, rows are added only for tokens that the template adds, with the mean."""
    max_positions: Count | None = None
    """Override for the longest sequence in config.json (rotary models only). The released
    config.json has the new value."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Computing precision. auto: bfloat16 on accelerators that have it, else float32. tf32:
    float32 whose matrix products round to 10-bit mantissas, on GPUs that support it; float32 never
    rounds so.
    Weights, optimizer state, norms, softmax and losses are always float32."""
    gradient_checkpointing: Literal["none", "dots", "full"] = "none"
    """Activations stored for the backward pass: none: all; dots: results of matrix products;
    full: only each layer's input."""
    attention: Literal["auto", "xla", "tiles", "cudnn", "pallas", "splash"] = "auto"
    """Attention implementation: xla on any device; tiles on CPUs; EasyAira's own pallas kernel or
    cudnn (bfloat16) on GPUs; splash on TPUs. auto: tiles; pallas or splash if it agrees with XLA on
    the run's own rows; otherwise xla."""
    dropout: Share = 0.0
    """Dropout on embeddings, attention and residual branches. Replaces the rates in the model's
    config.json. DPO with a reference and on-policy training refuse it."""


@dataclass(frozen=True)
class PolicyConfig(ModelConfig):
    """The policy to train, and its reference."""

    ref_name_or_path: str | None = None
    """Weights of the reference model; default: the policy's initial weights."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) beside frozen linear layers."""

    target_modules: list[str] | str
    """Linear layers that get an adapter, by Hugging Face names as in peft: a list of last name
    parts ([q_proj, k_proj, v_proj, o_proj]), a regular expression that matches full names, or
    all-linear: every linear layer of the blocks."""
    r: Count = 8
    """Rank of the adapters."""
    alpha: Positive = 8.0
    """Scale the output of an adapter by alpha / r."""
    rank_pattern: dict[str, Count] | None = None
    """Ranks of some layers by name, as in peft: {q_proj: 16}. The others have r."""
    alpha_pattern: dict[str, Positive] | None = None
    """Values of alpha of some layers by name, as in peft. The others have alpha."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    dora: bool = False
    """Train also the norm of each output's weights, as a vector of magnitudes (DoRA)."""
    dropout: Share = 0.0
    """Dropout on the input of the adapters; DPO refuses it, as TRL turns it off."""
    quantize: Literal["int8", "nf4"] | None = None
    """Store the frozen linear layers in 8 or 4 bits (QLoRA); null: in the computing precision."""
    trainable_token_indices: list[CountOrZero] | None = None
    """Ids of tokens whose vectors are trained, in the embedding and in an untied head; null: those
    that the template adds to the vocabulary."""
    modules_to_save: list[str] | None = None
    """Tables of vectors that are trained in full beside the adapters, by the last parts of Hugging
    Face's names, as in peft: the embedding (embed_tokens; wte for GPT-2) and an untied head
    (lm_head). A tied head is trained with the embedding."""
    adapter: str | None = None
    """Adapter to start from: a folder in PEFT's format, written by EasyAira or peft, or its hub
    id. Its rank, alpha, targets, dora and saved modules must equal those set here."""
