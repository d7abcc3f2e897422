"""Options of preference optimisation. Names follow TRL where the meaning is the same.

The string below an option is its `--help`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from easyaira.config.ranges import (
    Count,
    HalfShare,
    NonNegative,
    Number,
    Positive,
    Share,
    Weight,
    refuse_others,
)
from easyaira.errors import ConfigError, did_you_mean, shortened


class LossUse(NamedTuple):
    """Options that a preference loss supports.

    Attributes:
        smoothed: `label_smoothing`.
        divergences: other `f_divergence_type`s than reverse_kl: the loss depends only on the
            difference of the two log-ratios.
        margins: margins of the rows: the loss depends only on the difference of the two rewards,
            from which they are subtracted.
        reference: `needed`; `either`, if plain log-probabilities make sense, too; or `none`.
    """

    smoothed: bool = False
    divergences: bool = False
    margins: bool = False
    reference: Literal["needed", "either", "none"] = "needed"


LOSSES = {
    "sigmoid": LossUse(smoothed=True, divergences=True, margins=True, reference="either"),
    "ipo": LossUse(divergences=True, reference="either"),
    "ipo_sum": LossUse(divergences=True),
    "hinge": LossUse(divergences=True, margins=True, reference="either"),
    "robust": LossUse(smoothed=True, divergences=True, margins=True),
    "sigmoid_norm": LossUse(divergences=True, margins=True, reference="either"),
    "dpo_norm": LossUse(divergences=True, margins=True, reference="either"),
    "apo_zero": LossUse(),
    "apo_down": LossUse(),
    "exo_pair": LossUse(smoothed=True, divergences=True),
    "nca_pair": LossUse(),
    "bco_pair": LossUse(),
    "sppo_hard": LossUse(),
    "dpop": LossUse(),
    "discopop": LossUse(divergences=True),
    "simpo": LossUse(margins=True, reference="none"),
    "orpo": LossUse(reference="none"),
    "sft": LossUse(divergences=True, reference="either"),
}
SMOOTHED_LOSSES = tuple(name for name, use in LOSSES.items() if use.smoothed)
_SORTS = (
    "sorts the margins of the whole batch, so micro-batches and packing would change the loss; "
    "use sigmoid or apo_zero"
)
UNPAIRED = "kto"  # takes rows with one answer and a label
REFUSED = {
    "aot": _SORTS,
    "aot_pair": _SORTS,
    "aot_unpaired": _SORTS,
    "tr_dpo": "moves the reference during the run, so its log-probabilities cannot be computed "
    "once; use sigmoid, and train again from the result",
}
PAIRED_OPTIONS = ("reference", "label_smoothing", "f_divergence_type", "ld_alpha", "use_weighting")
PAIRED_OPTIONS += ("sft_weight", "answers")
ONLY_OF = {  # option: the only loss, or divergence, that it applies to
    "simpo_gamma": "simpo",
    "dpop_lambda": "dpop",
    "f_alpha_divergence_coef": "alpha_divergence",
    **dict.fromkeys(("desirable_weight", "undesirable_weight", "kto_group"), UNPAIRED),
}
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def others_only(options: Mapping[str, Any]) -> dict[str, str]:
    """Options that apply only to other losses than the chosen ones, with the name of one."""
    chosen = _names(options["loss_type"])
    if UNPAIRED in chosen:
        return dict.fromkeys(PAIRED_OPTIONS, "pairs") | {
            name: of for name, of in ONLY_OF.items() if of != UNPAIRED
        }
    return {
        name: of
        for name, of in ONLY_OF.items()
        if of not in chosen and of != options["f_divergence_type"]
    }


def _names(loss_type: Sequence[str] | str) -> Sequence[str]:
    return [loss_type] if isinstance(loss_type, str) else loss_type


@dataclass(frozen=True)
class DPOConfig:
    """Preference optimisation."""

    loss_type: list[str] | str = "sigmoid"
    """Preference loss, or a list that is added up: sigmoid, ipo, ipo_sum, hinge, robust, dpo_norm
    (sigmoid_norm), apo_zero, apo_down, exo_pair, nca_pair, bco_pair, sppo_hard, dpop, discopop;
    without reference simpo, orpo; beside others sft; alone kto. See docs/dpo.md for papers."""
    loss_weights: list[Weight] | None = None
    """Weight of each loss; default: 1."""
    reference: Literal["model", "none"] = "model"
    """model: losses compare the policy with the reference; none: they take the policy's own
    log-probabilities (SimPO, ORPO, CPO, SLiC), and no reference is computed."""
    answers: Literal["all_pairs", "best_rest", "best_worst", "plackett_luce"] = "all_pairs"
    """Of more than two answers to a prompt, compare: all pairs; the best with each other one; the
    best with the worst; or all at once by the Plackett-Luce model (sigmoid only). Tied answers are
    not compared. The loss is the mean over a prompt's pairs."""
    beta: Positive = 0.1
    """Strength of the penalty that keeps the policy close to the reference; without a reference,
    scale of the log-probabilities."""
    label_smoothing: HalfShare = 0.0
    """Assumed share of pairs with a wrong label (sigmoid, robust, exo_pair)."""
    simpo_gamma: NonNegative = 0.5
    """simpo: target margin of the rewards."""
    dpop_lambda: NonNegative = 50.0
    """dpop: weight of the penalty on chosen answers that become less likely than before."""
    f_divergence_type: Divergence = "reverse_kl"
    """Divergence from the reference that the loss penalises."""
    f_alpha_divergence_coef: Number = 0.5
    """Coefficient of alpha_divergence; at 1 it is reverse_kl."""
    ld_alpha: Share | None = None
    """LD-DPO: weight of the tokens of the longer answer that lie beyond the length of the shorter
    one; null: 1."""
    use_weighting: bool = False
    """WPO: weight each pair by the policy's own probability of its two answers."""
    sft_weight: NonNegative = 0.0
    """Weight of the negative log-likelihood of the chosen answers, per token (RPO)."""
    desirable_weight: Weight = 1.0
    """kto: weight of answers with label 1."""
    undesirable_weight: Weight = 1.0
    """kto: weight of answers with label 0."""
    kto_group: Count = 8
    """kto: examples among which the KL divergence is estimated; they stay together."""
    precompute_ref_log_probs: bool = True
    """Compute the reference's log-probabilities once before training; false: in every step."""

    def __post_init__(self):
        names = _names(self.loss_type)
        refuse_others("dpo", self, others_only(vars(self)))
        if UNPAIRED in names:
            return self._check_unpaired(names)
        for name in names or ["none"]:
            if name in REFUSED:
                raise ConfigError(f"dpo.loss_type: {name} {REFUSED[name]}")
            if name not in LOSSES:
                raise ConfigError(
                    f"dpo.loss_type: expected one or more of {', '.join(LOSSES)}, or "
                    f"{UNPAIRED}, got {shortened(name)}{did_you_mean(name, [*LOSSES, UNPAIRED])}"
                )
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ConfigError(
                f"dpo.loss_weights: {len(self.loss_weights)} weights for {len(names)} losses; give "
                "each loss one"
            )
        if not self.losses:
            raise ConfigError(
                "dpo.loss_type: sft alone compares no answers; add a preference loss, or use "
                "easyaira sft"
            )
        uses = {name: LOSSES[name] for name in self.losses}
        if self.answers == "plackett_luce":
            self._check_plackett_luce(uses)
        if self.label_smoothing and not any(use.smoothed for use in uses.values()):
            raise ConfigError(
                f"dpo.label_smoothing: {' and '.join(uses)} has no smoothing; set it to 0, or use "
                f"one of {', '.join(SMOOTHED_LOSSES)}"
            )
        if "exo_pair" in uses and not self.label_smoothing:
            raise ConfigError(
                "dpo.label_smoothing: exo_pair needs a value above 0, such as 0.001, because it "
                "takes its logarithm"
            )
        per_token = {"ipo", "sigmoid_norm", "dpo_norm", "simpo", "orpo"} & uses.keys()
        if self.ld_alpha is not None and (per_token or self.nll_weight):
            divides = ", ".join(sorted(per_token)) or "the likelihood of chosen answers"
            raise ConfigError(
                f"dpo.ld_alpha: {divides} divides by the whole length of an answer; leave it out"
            )
        self._check_reference(uses)

    def _check_plackett_luce(self, uses: dict[str, LossUse]) -> None:
        if [*uses] != ["sigmoid"]:
            raise ConfigError(
                f"dpo.answers: plackett_luce takes the place of sigmoid, not of "
                f"{' and '.join(uses)}; choose all_pairs, or set dpo.loss_type sigmoid"
            )
        for name in ("label_smoothing", "use_weighting"):
            if getattr(self, name):
                raise ConfigError(
                    f"dpo.{name}: applies to pairs, and plackett_luce has none; leave it out, or "
                    "set dpo.answers all_pairs"
                )

    def _check_unpaired(self, names: Sequence[str]) -> None:
        if len(names) > 1 or self.loss_weights is not None:
            raise ConfigError(
                f"dpo.loss_type: {UNPAIRED} takes single answers and other losses pairs; use it "
                "alone, without dpo.loss_weights"
            )

    def _check_reference(self, uses: dict[str, LossUse]) -> None:
        for name, use in uses.items():
            if use.reference == "none" and self.reference == "model":
                raise ConfigError(f"dpo.loss_type: {name} has no reference; set dpo.reference none")
            if use.reference == "needed" and self.reference == "none":
                free = [other for other, use in LOSSES.items() if use.reference != "needed"]
                raise ConfigError(
                    f"dpo.reference: {name} needs a reference; set it to model, or choose from "
                    f"{', '.join(free)}"
                )
            if self.f_divergence_type == "reverse_kl":
                continue
            if not use.divergences or self.reference == "none":
                raise ConfigError(
                    f"dpo.f_divergence_type: {name} {'without a reference ' * use.divergences}has "
                    "reverse_kl only; leave it out"
                )
        if "orpo" in uses and not self.nll_weight:
            raise ConfigError(
                "dpo.loss_type: orpo is added to the log-likelihood of the chosen answers; set "
                "dpo.sft_weight to 1"
            )

    @property
    def unpaired(self) -> bool:
        """Whether rows are single answers with a label."""
        return UNPAIRED in _names(self.loss_type)

    @property
    def _weights(self) -> list[tuple[str, float]]:
        names = _names(self.loss_type)
        return list(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    @property
    def losses(self) -> dict[str, float]:
        """Weight of each preference loss."""
        names = dict.fromkeys(name for name, _ in self._weights if name != "sft")
        return {name: sum(w for other, w in self._weights if other == name) for name in names}

    @property
    def compared(self) -> str:
        """Which of a row's answers are read: all, best_rest or best_worst."""
        return self.answers if self.answers in ("best_rest", "best_worst") else "all"

    @property
    def tail(self) -> float:
        """Weight of the tokens beyond the length of the shorter answer."""
        return 1.0 if self.ld_alpha is None else self.ld_alpha

    @property
    def nll_weight(self) -> float:
        """Weight of the negative log-likelihood of the chosen answers, per token."""
        return self.sft_weight + sum(weight for name, weight in self._weights if name == "sft")
