"""Options of the model and its adapters.

The text below an option is its `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from easyaira.config.ranges import Share


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    name_or_path: str
    """Hugging Face folder, hub id (owner/name), or a run folder of EasyAira."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit that was read is recorded in the run."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: read only config.json and draw the weights as Hugging Face does."""
    resize: Literal["mean", "normal"] | None = None
    """Make the embedding as long as the tokenizer. New rows are the mean of the old ones, or drawn
    with the model's own standard deviation (as Aira's originals were). By default the embedding
    changes only for tokens that the template adds, with the mean."""
    max_positions: PositiveInt | None = None
    """Longest sequence, where it shall be another than config.json says: only for models with
    rotary positions. The released config.json will say it."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Precision of the computation: auto is bfloat16 on accelerators and float32 on CPU. tf32 is
    float32 with products of 10-bit mantissas, on GPUs that have them; float32 never rounds so.
    Weights, optimizer state, norms, softmax and losses are always float32."""
    gradient_checkpointing: Literal["none", "dots", "full"] = "none"
    """Keep all activations, only results of matrix products, or only the input of each layer."""
    attention: Literal["auto", "xla", "cudnn", "pallas", "splash"] = "auto"
    """How attention is computed: by XLA everywhere; by cuDNN's kernel (in bfloat16) or EasyAira's
    own (pallas) on GPUs; by the splash kernel on TPUs. auto takes the first of these kernels that
    agrees with XLA on the run's own rows, and XLA if none does."""
    dropout: Share = 0.0
    """Dropout on embeddings, attention and residual branches. Off unless asked for, whatever the
    model's config.json says; DPO refuses it."""


@dataclass(frozen=True)
class PolicyConfig(ModelConfig):
    """The policy that is trained, and the reference it is held to."""

    ref_name_or_path: str | None = None
    """Weights of the DPO reference; default: those the policy starts from."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) beside frozen linear layers."""

    target_modules: list[str] | str
    """Hugging Face's names of the linear layers that get one, as in peft: a list of last parts
    ([q_proj, k_proj, v_proj, o_proj]), or a regular expression that fits whole names."""
    r: PositiveInt = 8
    """Rank of an adapter."""
    alpha: PositiveFloat = 8.0
    """An adapter's product is multiplied by alpha / r."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    dropout: Share = 0.0
    """Dropout on the input of adapters."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the frozen linear layers in 8 or 4 bits (QLoRA); null: in the precision of the
    computation."""
    adapter: str | None = None
    """Adapter to go on with: a folder in PEFT's format, ours or peft's, or its hub id. Its rank,
    alpha and targets must be those given here."""
