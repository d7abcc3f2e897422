"""Options of the algorithms and the optimizer.

The text below an option is its `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat

from easyaira.config.ranges import HalfShare, Share
from easyaira.errors import ConfigError

SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning."""

    completion_only_loss: bool = True
    """Learn what follows the prompt only; false learns the prompt, too. In a conversation, the
    prompt is all that stands before the first answer."""
    assistant_only_loss: bool = True
    """Of what follows the prompt, learn the assistant's turns only; false learns all of it."""
    last_turn_only: bool = False
    """Learn the last answer of a conversation only; all before it is the prompt."""


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation."""

    loss_type: Literal[
        "sigmoid",
        "ipo",
        "ipo_sum",
        "hinge",
        "robust",
        "sigmoid_norm",
        "apo_zero",
        "apo_down",
        "exo_pair",
        "nca_pair",
    ] = "sigmoid"
    """The preference loss; each is one function of easyaira/losses/preference.py, with its
    paper."""
    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: HalfShare = 0.0
    """Share of pairs whose label is assumed wrong (sigmoid, robust, exo_pair)."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood of the chosen answers, per token (RPO)."""
    precompute_ref_log_probs: bool = True
    """Compute the reference's log-probabilities once, before training, instead of in every step."""

    def __post_init__(self):
        if self.label_smoothing and self.loss_type not in SMOOTHED_LOSSES:
            raise ConfigError(
                f"dpo.label_smoothing: the loss {self.loss_type} has none; set it to 0, or use "
                f"one of {', '.join(SMOOTHED_LOSSES)}"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ConfigError(
                "dpo.label_smoothing: exo_pair takes its logarithm, so it must be above 0; "
                "0.001 is usual"
            )


@dataclass(frozen=True)
class RewardConfig:
    """A reward or toxicity model: one number for a text, the higher, the better.

    Pairs of answers, or of texts, learn by how much the better one scores higher; texts with a
    label learn on which side of 0 they belong.
    """

    margin: NonNegativeFloat = 0.0
    """Of pairs: the lead of the better answer's score at which its loss is ln 2."""
    positive_label: Literal[0, 1] = 0
    """Of texts with a label: the label whose texts are to score above 0. In toxicity sets, 1 means
    toxic, and a toxic text scores below 0 (as Aira's models do), so it is 0."""
    label: str = "REWARD"
    """What the score is called in the released config.json."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Norms and biases do not decay."""

    learning_rate: NonNegativeFloat = 5e-5
    """The peak of the schedule."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    """How the rate goes from its peak to the end: to 0 for linear and cosine."""
    warmup_steps: NonNegativeInt = 0
    """Updates in which the rate climbs from 0 (the first update has rate 0)."""
    warmup_ratio: Share = 0.0
    """The same as a share of all updates, rounded up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices and embeddings."""
    adam_beta1: Share = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: Share = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""

    def __post_init__(self):
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("optimizer.warmup_steps and optimizer.warmup_ratio: set one of them")
