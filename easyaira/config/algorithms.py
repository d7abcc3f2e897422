"""Options of the algorithms and the optimizer.

The string below an option is its `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from easyaira.config.ranges import (
    CountOrZero,
    Decay,
    NonNegative,
    Positive,
    Share,
)
from easyaira.errors import ConfigError

WITH_FLOOR = ("cosine_with_min_lr", "warmup_stable_decay")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning."""

    completion_only_loss: bool = True
    """Put loss only on the tokens after the prompt; false: on the prompt, too. The prompt of a
    conversation ends where the first answer starts."""
    assistant_only_loss: bool = True
    """After the prompt, put loss only on the assistant's turns; false: on every turn."""
    last_turn_only: bool = False
    """Put loss only on the last answer of a conversation; everything before it is the prompt."""
    loss_type: Literal["nll", "dft"] = "nll"
    """nll: negative log-likelihood; dft: the same, weighted by each token's probability (dynamic
    fine-tuning)."""
    label_smoothing: Share = 0.0
    """nll: share of each label that is spread evenly over the vocabulary."""
    router_aux_loss: bool = False
    """Mixtures of experts: add each example's load-balancing loss, times router_aux_loss_coef of
    config.json."""

    def __post_init__(self):
        if self.label_smoothing and self.loss_type != "nll":
            raise ConfigError(
                f"sft.label_smoothing: {self.loss_type} has no smoothing; set it to 0, or set "
                "sft.loss_type nll"
            )


@dataclass(frozen=True)
class RewardConfig:
    """A reward or toxicity model: one score for a text, where higher is better.

    Pairs train the difference between the two scores. Texts with a label train the score's sign.
    """

    margin: NonNegative = 0.0
    """Pairs: score difference at which the loss is ln 2 (subtracted from the difference), for rows
    without a margin of their own."""
    center_rewards_coefficient: NonNegative = 0.0
    """Pairs: weight of the squared sum of both scores, which keeps scores near 0."""
    positive_label: Literal[0, 1] = 0
    """Texts with a label: the label that scores above 0. Toxicity data sets label toxic texts 1,
    and Aira's models score toxic texts below 0; hence 0."""
    label: str = "REWARD"
    """Name of the score in the released config.json."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, without weight decay on norms and biases."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the matrices of layers, at AdamW's learning rate; AdamW for
    embeddings, head, norms and biases. Without adapters."""
    learning_rate: NonNegative = 5e-5
    """Peak of the learning-rate schedule."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"
    """Decay of the learning rate after its peak, as in transformers; linear and cosine end at 0,
    cosine_with_min_lr and warmup_stable_decay at min_lr_rate. constant has no warm-up."""
    min_lr_rate: Share = 0.0
    """Last learning rate as a share of the peak (cosine_with_min_lr, warmup_stable_decay)."""
    decay_ratio: Share = 0.1
    """warmup_stable_decay: last share of all updates, rounded up, in which the rate decays; from
    the warm-up until then it is constant."""
    warmup_steps: CountOrZero = 0
    """Updates of linear warmup; the first has rate 0 (warmup_stable_decay: min_lr_rate of the
    peak)."""
    warmup_ratio: Share = 0.0
    """Warmup as a share of all updates, rounded up; instead of warmup_steps."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay on matrices and embeddings."""
    adam_beta1: Decay = 0.9
    """Decay rate of the gradient's running mean."""
    adam_beta2: Decay = 0.999
    """Decay rate of the squared gradient's running mean."""
    adam_epsilon: Positive = 1e-8
    """Constant added to the root of the squared gradient's running mean."""
    max_grad_norm: NonNegative = 1.0
    """Clip gradients to this global norm; 0: no clipping."""
    state_dtype: Literal["float32", "8bit"] = "float32"
    """Precision of both running means. 8bit: codes with a scale per 256 values, as in bitsandbytes,
    2 bytes a parameter instead of 8; norms, biases and small matrices stay float32."""

    def __post_init__(self):
        if self.name == "muon" and self.state_dtype == "8bit":
            raise ConfigError(
                "optimizer.state_dtype: 8bit is AdamW's, and muon has half of that state already; "
                "set it to float32"
            )
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("optimizer.warmup_steps and optimizer.warmup_ratio: set one of them")
        if self.min_lr_rate and self.lr_scheduler_type not in WITH_FLOOR:
            raise ConfigError(
                f"optimizer.min_lr_rate: {self.lr_scheduler_type} has none; leave it out, or use "
                f"{' or '.join(WITH_FLOOR)}"
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ConfigError(
                "optimizer.lr_scheduler_type: constant has no warm-up; use constant_with_warmup, "
                "or set optimizer.warmup_steps to 0"
            )
