"""Signs that a DPO run is ill: in the data before the first update, and in the metrics after it.

SIGNS is the table of docs/dpo.md: each sign with its threshold, the reason for it, and what to try.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from easyaira.run import health_curves, health_data
from easyaira.run.health_facts import Run


class Sign(NamedTuple):
    """A sign of illness.

    Attributes:
        name: of the illness.
        limit: threshold.
        when: the condition in words; {} stands for the limit.
        why: reason for the threshold.
        do: what to try.
        seen: (run, limit) -> the evidence, or None.
    """

    name: str
    limit: float
    when: str
    why: str
    do: str
    seen: Callable[[Run, float], str | None]


def warnings(run: Run | None) -> dict[str, str]:
    """Sign -> sentence with its evidence and what to try."""
    if run is None:
        return {}
    evidences = {sign.name: (sign.seen(run, sign.limit), sign.do) for sign in SIGNS}
    return {name: f"{evidence}: {do}" for name, (evidence, do) in evidences.items() if evidence}


SIGNS = (
    Sign(
        "answers cut",
        0.05,
        "pairs cut to `data.max_length` with `keep_start` > {} of all",
        "a cut answer teaches the model not to stop; the data report warns at the same limit",
        "raise data.max_length, or set data.truncation to drop",
        health_data.answers_cut,
    ),
    Sign(
        "end token unknown",
        0.1,
        "probability of a chosen answer's last token by the starting model < {} / its length",
        "a model that ends at random among n tokens has 1 / n",
        "start from an SFT model, with its own data.template",
        health_data.end_unknown,
    ),
    Sign(
        "other template",
        1,
        "the model's tokenizer has another chat template",
        "prompts no longer have the form that the model learned to answer",
        "set data.template to chat, unless the model was trained with this one",
        health_data.other_template,
    ),
    Sign(
        "held-out leaked",
        0.01,
        "held-out pairs whose prompt is trained on > {} of all",
        "the data report warns at the same limit",
        "divide the data by prompt: set data.eval to a share of data.train",
        health_data.held_out_leaked,
    ),
    Sign(
        "pairs repeated",
        0.05,
        "copies of pairs > {} of all",
        "3 to 14 % of texts in web corpora are near copies (Lee et al., 2022); sets of pairs here "
        "have below 1 %",
        "remove the copies; to repeat a source, give it a weight in data.train",
        health_data.pairs_repeated,
    ),
    Sign(
        "tails identical",
        0.3,
        "pairs whose answers share an end of half of the shorter one > {} of all",
        "TruthfulQA, whose answers often differ in one word, has 0.14; other sets at most 0.03",
        "cut the common ends off",
        health_data.tails_identical,
    ),
    Sign(
        "length decides",
        0.8,
        "the longer (or shorter) answer is chosen in >= {} of the pairs",
        "two people agree on 0.63 to 0.81 of such pairs (Bai et al., 2022; Zheng et al., 2023), so "
        "content could hardly predict labels better",
        "balance the pairs by length, or use dpo.loss_type sigmoid_norm or dpo.ld_alpha",
        health_data.length_decides,
    ),
    Sign(
        "labels flipped",
        0.1,
        "pairs whose rejected answer the reference finds likelier by > 1 nat a token >= {} of all",
        "the pairs here have 0 to 0.08, the same with 30 % of the labels flipped 0.12",
        "read some of these pairs; if labels are noisy, set dpo.label_smoothing or use robust",
        health_data.labels_flipped,
    ),
    Sign(
        "reference is not the start",
        0.01,
        "log-probabilities of policy and reference before the first update differ by > {} nats a "
        "token",
        "equal weights give exactly 0; the limit leaves room for another rounding",
        "leave out model.ref_name_or_path, unless you mean it",
        health_data.other_reference,
    ),
    Sign(
        "rate too low",
        0.5,
        "log-probabilities of whole answers moved by < {} nats, half of the run done",
        "an answer is then not 1.7 times as likely as before; healthy runs here move by 3 to 90",
        "multiply optimizer.learning_rate by ten first",
        health_curves.rate_low,
    ),
    Sign(
        "rate too high",
        0.2,
        "in >= {} of the logged updates, the loss is > 1.1 x its value at the start, and chosen "
        "answers moved by > 0.2 nats a token",
        "at the start no answer is preferred, so a larger loss means that earlier updates reversed "
        "the order of some pairs; healthy runs here have none",
        "divide optimizer.learning_rate by ten first",
        health_curves.rate_high,
    ),
    Sign(
        "chosen answers fall",
        0.5,
        "chosen answers lose > {} nats a token while the margin is positive",
        "some fall is usual (Pal et al., 2024; Razin et al., 2024); models whose answers stay "
        "readable lose less than 0.2",
        "set dpo.sft_weight to 1, use dpop, or lower optimizer.learning_rate",
        health_curves.chosen_falls,
    ),
    Sign(
        "accuracy at chance",
        2,
        "reward accuracy over the second half of the run < 0.5 + {} standard errors",
        "an accuracy of coin tosses stays below it in 98 of 100 runs",
        "check that prompts and answers belong together and labels are right; then raise "
        "optimizer.learning_rate",
        health_curves.at_chance,
    ),
    Sign(
        "margins explode",
        1,
        "margin >= {} and loss no lower than at the start",
        "were all margins 1, the loss of `sigmoid` would be 0.31, not 0.69",
        "lower dpo.beta (0.01 to 0.5 are usual), or optimizer.learning_rate",
        health_curves.margins_explode,
    ),
    Sign(
        "gradient spikes",
        10,
        "largest gradient norm >= {} x the median and 2 x the largest of the first five logged",
        "weights of pairs in the gradient of `sigmoid` are 1/2 at first and at most 1, so margins "
        "explain at most a doubling; solved pairs lower the median, hence the second condition",
        "lower optimizer.learning_rate, lengthen the warm-up, or read the rows of that update",
        health_curves.gradient_spikes,
    ),
    Sign(
        "overfitting",
        0.1,
        "training accuracy - held-out accuracy >= {} + 2 standard errors, and held-out loss above "
        "its least",
        "a gap that the number of held-out pairs does not explain",
        "train fewer epochs, raise dpo.beta, or lower optimizer.learning_rate",
        health_curves.held_out_apart,
    ),
    Sign(
        "longer preferred",
        0.2,
        "pairs whose longer answer has the larger reward >= share of the labels + {}",
        "five standard errors of 144 pairs; healthy runs here are -0.15 to 0.02 away",
        "use dpo.loss_type sigmoid_norm or dpo.ld_alpha",
        health_curves.longer_preferred,
    ),
)
SHOWN_WITH_DATA = ("answers cut", "held-out leaked")  # printed when the data are read
