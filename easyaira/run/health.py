"""Signs that a DPO run is ill: in the data before the first update, and in the metrics after it.

SIGNS is the table of docs/dpo.md: each sign with its threshold, the reason for it, and what to try.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from easyaira.config.run import TrainDPO
from easyaira.run.hacking import PHASE, means
from easyaira.train.optimizer import warmup_steps
from easyaira.train.setup import Setup

FEWEST = 5  # logged updates after the warm-up, before curves are judged
SURE = 2  # standard errors


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        rows: of metrics.jsonl.
        data: of data_report.json.
        beta, batch, warmup: dpo.beta, pairs per update, updates of the warm-up.
        reference: a reference model is compared with.
    """

    rows: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]
    beta: float = 0.1
    batch: int = 8
    warmup: int = 0
    reference: bool = True

    @cached_property
    def start(self) -> Mapping[str, Any]:
        """Metrics before the first update."""
        return next((row for row in self.rows if row["step"] == 0 and "loss" in row), {})

    @cached_property
    def learned(self) -> list[Mapping[str, Any]]:
        """Rows of updates at the full learning rate; none while they are too few to judge."""
        rows = [
            row
            for row in self.rows
            if row["step"] > self.warmup
            and all(isinstance(row.get(name), int | float) for name in NEEDED)
        ]
        return rows if len(rows) >= FEWEST and self.start else []

    @cached_property
    def last(self) -> dict[str, float]:
        """Means over the last fifth of `learned`."""
        return means(self.learned[-max(len(self.learned) // PHASE, FEWEST // 2) :])

    @cached_property
    def held_out(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if isinstance(row.get("eval_loss"), int | float)]

    @property
    def pairs(self) -> Mapping[str, int]:
        return self.data.get("pairs", {})

    @property
    def tokens(self) -> float:
        """Mean length of a chosen answer."""
        return max(self.pairs.get("chosen tokens", 0) / max(self.pairs.get("pairs", 0), 1), 1)

    @property
    def moved(self) -> float | None:
        """Change of the chosen answers' log-probability, in nats per token."""
        if not self.learned or not self.reference:
            return None
        return self.last["rewards/chosen"] / self.beta / self.tokens


def of_setup(setup: Setup, rows: Sequence[Mapping[str, Any]]) -> Run | None:
    """A run of pairs; None: it has none."""
    config = setup.config
    if not isinstance(config, TrainDPO) or config.dpo.unpaired:
        return None
    warmup = warmup_steps(config.optimizer, setup.total_steps)
    compared = config.dpo.reference == "model"
    data = setup.data.report
    return Run(rows, data, config.dpo.beta, config.train_batch_size, warmup, compared)


NEEDED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class Sign(NamedTuple):
    """A sign of illness.

    Attributes:
        name: of the illness.
        limit: threshold.
        when: what is compared with it; {} stands for the limit.
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
    found = {sign.name: (sign.seen(run, sign.limit), sign.do) for sign in SIGNS}
    return {name: f"{evidence}: {do}" for name, (evidence, do) in found.items() if evidence}


def answers_cut(run: Run, limit: float) -> str | None:
    part = run.data.get("train", {})
    cut = part.get("noted", {}).get("cut to max_length (keep_start)", 0)
    if cut <= limit * part.get("kept", 0):
        return None
    return (
        f"{cut / part['kept']:.0%} of the pairs are cut to data.max_length, and teach no end token"
    )


def end_unknown(run: Run, limit: float) -> str | None:
    end = run.start.get("logps/end")
    if end is None or end >= math.log(limit / run.tokens):
        return None
    return (
        f"The starting model ends a chosen answer with probability {math.exp(end):.1g}, where an "
        f"end at random among its {run.tokens:.0f} tokens has {1 / run.tokens:.1g}, so it has not "
        "learned the end token"
    )


def other_template(run: Run, limit: float) -> str | None:
    if (run.data.get("own template") == "other") < limit:
        return None
    return f"data.template {run.data['template'][:40]} writes other prompts than the model's own"


def held_out_leaked(run: Run, limit: float) -> str | None:
    part = run.data.get("held out", {})
    leaked = part.get("prompts also trained on", 0)
    if leaked <= limit * part.get("examples", 0):
        return None
    return (
        f"{leaked:,} of {part['examples']:,} held-out pairs have a prompt that is also trained on, "
        "so held-out metrics partly measure memorisation"
    )


def pairs_repeated(run: Run, limit: float) -> str | None:
    repeats, count = run.pairs.get("repeats", 0), run.pairs.get("pairs", 0)
    if repeats <= limit * count:
        return None
    return f"{repeats:,} of {count:,} pairs are copies of others, which count more than once"


def tails_identical(run: Run, limit: float) -> str | None:
    same, count = run.pairs.get("common ends", 0), run.pairs.get("compared", 0)
    if same <= limit * count:
        return None
    return (
        f"In {same / count:.0%} of the pairs both answers end with the same words, half of the "
        "shorter answer or more, which say nothing of the preference and are trained on"
    )


def length_decides(run: Run, limit: float) -> str | None:
    counts = {side: run.pairs.get(f"{side} longer", 0) for side in ("chosen", "rejected")}
    side = max(counts, key=lambda side: counts[side])
    share = counts[side] / max(sum(counts.values()), 1)
    if share < limit:
        return None
    rule = "longer" if side == "chosen" else "shorter"
    return f"The {rule} answer is the chosen one in {share:.0%} of the pairs, so length decides"


def labels_flipped(run: Run, limit: float) -> str | None:
    against = run.start.get("reference/prefers_rejected", 0.0)
    if against < limit:
        return None
    return (
        f"The reference finds the rejected answer by far the likelier one in {against:.0%} of the "
        f"pairs, the chosen one in {run.start['reference/prefers_chosen']:.0%}, so labels may be "
        "flipped"
    )


def other_reference(run: Run, limit: float) -> str | None:
    sides = [run.start.get(f"rewards/{side}", 0.0) for side in ("chosen", "rejected")]
    apart = max(map(abs, sides)) / run.beta / run.tokens
    if not run.reference or apart <= limit:
        return None
    return (
        f"Before the first update, policy and reference already differ by {apart:.2g} nats a "
        "token, so margins start apart from 0"
    )


def rate_low(run: Run, limit: float) -> str | None:
    if not run.learned or not run.reference:
        return None
    sides = [run.last[f"rewards/{side}"] for side in ("chosen", "rejected")]
    moved = max(map(abs, sides)) / run.beta
    if moved >= limit:
        return None
    return (
        f"After {run.learned[-1]['step']} updates, the log-probabilities of whole answers have "
        f"moved by {moved:.2g} nats, so the model hardly learns"
    )


def rate_high(run: Run, limit: float) -> str | None:
    if not run.learned or run.moved is None:
        return None
    losses = [row["loss"] for row in run.learned] + [row["eval_loss"] for row in run.held_out]
    return None if max(losses) < limit else f"loss {max(losses)}"


def chosen_falls(run: Run, limit: float) -> str | None:
    if run.moved is None or -run.moved <= limit or run.last["rewards/margins"] <= 0:
        return None
    return (
        f"The margin grows to {run.last['rewards/margins']:.2g}, but chosen answers lose "
        f"{-run.moved:.2g} nats a token, more than the little that is usual, so other texts become "
        "likely"
    )


def at_chance(run: Run, limit: float) -> str | None:
    if not run.learned:
        return None
    rows = run.learned[len(run.learned) // 2 :]
    accuracy = means(rows)["rewards/accuracies"]
    pairs = run.batch * (rows[-1]["step"] - run.learned[len(run.learned) // 2 - 1]["step"])
    bound = 0.5 + limit * 0.5 / math.sqrt(max(pairs, 1))
    if accuracy >= bound:
        return None
    return (
        f"Reward accuracy is {accuracy:.2f} over the last {pairs:,} pairs, which is no more than "
        f"chance ({bound:.2f})"
    )


def margins_explode(run: Run, limit: float) -> str | None:
    if not run.learned or run.last["loss"] < run.start["loss"]:
        return None
    margin = run.last["rewards/margins"]
    if margin < limit:
        return None
    return (
        f"The margin grew to {margin:.3g}, but the loss to {run.last['loss']:.3g} from "
        f"{run.start['loss']:.3g}, so pairs with large negative margins decide the updates"
    )


def gradient_spikes(run: Run, limit: float) -> str | None:
    norms = [row["grad_norm"] for row in run.learned if "grad_norm" in row]
    if len(norms) < 2 * FEWEST:
        return None
    usual, largest = sorted(norms)[len(norms) // 2], max(norms)
    if largest < limit * usual:
        return None
    step = next(row["step"] for row in run.learned if row.get("grad_norm") == largest)
    return f"The gradient norm jumped to {largest:.3g} at update {step}; its median is {usual:.3g}"


def held_out_apart(run: Run, limit: float) -> str | None:
    count = run.data.get("held out", {}).get("examples", 0)
    if not run.learned or len(run.held_out) < 2 or not count:
        return None
    last, least = run.held_out[-1], min(row["eval_loss"] for row in run.held_out)
    trained, held_out = run.last["rewards/accuracies"], last.get("eval_rewards/accuracies", 1.0)
    by_chance = SURE * math.sqrt(0.25 / count)
    if trained - held_out < limit + by_chance or last["eval_loss"] <= least:
        return None
    return (
        f"Reward accuracy is {trained:.2f} in training and {held_out:.2f} on held-out pairs, whose "
        f"loss rose from {least:.3g} to {last['eval_loss']:.3g}, so the model memorises its pairs"
    )


def longer_preferred(run: Run, limit: float) -> str | None:
    longer = run.last.get("rewards/longer") if run.learned else None
    unequal = run.pairs.get("chosen longer", 0) + run.pairs.get("rejected longer", 0)
    if longer is None or not unequal:
        return None
    share = run.pairs["chosen longer"] / unequal
    if longer < share + limit:
        return None
    return (
        f"The model gives the longer answer the larger reward in {longer:.0%} of the pairs, the "
        f"labels do in {share:.0%}, so it learns length"
    )


SIGNS = (
    Sign(
        "answers cut",
        0.05,
        "pairs cut to `data.max_length` with `keep_start` > {} of all",
        "a cut answer teaches to go on; the limit at which the data warn, too",
        "raise data.max_length, or set data.truncation to drop",
        answers_cut,
    ),
    Sign(
        "end token unknown",
        0.1,
        "probability of a chosen answer's last token by the starting model < {} / its length",
        "a model that ends at random among n tokens has 1 / n",
        "start from an SFT model, with its own data.template",
        end_unknown,
    ),
    Sign(
        "other template",
        1,
        "the model's tokenizer has another chat template",
        "what the model learned to answer is no longer written",
        "set data.template to chat, unless the model was trained with this one",
        other_template,
    ),
    Sign(
        "held-out leaked",
        0.01,
        "held-out pairs whose prompt is trained on > {} of all",
        "the limit at which the data warn, too",
        "divide the data by prompt: set data.eval to a share of data.train",
        held_out_leaked,
    ),
    Sign(
        "pairs repeated",
        0.05,
        "copies of pairs > {} of all",
        "3 to 14 % of texts in web corpora are near copies (Lee et al., 2022); sets of pairs here "
        "have below 1 %",
        "remove the copies; to repeat a source, give it a weight in data.train",
        pairs_repeated,
    ),
    Sign(
        "tails identical",
        0.3,
        "pairs whose answers share an end of half of the shorter one > {} of all",
        "TruthfulQA, whose answers often differ in one word, has 0.14; other sets at most 0.03",
        "cut the common ends off",
        tails_identical,
    ),
    Sign(
        "length decides",
        0.8,
        "the longer (or shorter) answer is chosen in >= {} of the pairs",
        "two people agree on 0.63 to 0.81 of such pairs (Bai et al., 2022; Zheng et al., 2023), so "
        "nothing else could predict labels better",
        "balance the pairs by length, or use dpo.loss_type sigmoid_norm or dpo.ld_alpha",
        length_decides,
    ),
    Sign(
        "labels flipped",
        0.1,
        "pairs whose rejected answer is likelier by the reference by > 0.5 nats a token >= {}",
        "TBD",
        "read some of these pairs; if labels are noisy, set dpo.label_smoothing or use robust",
        labels_flipped,
    ),
    Sign(
        "reference is not the start",
        0.01,
        "log-probabilities of policy and reference before the first update differ by > {} nats a "
        "token",
        "bfloat16 rounds the log-probability of a token by less",
        "leave out model.ref_name_or_path, unless you mean it",
        other_reference,
    ),
    Sign(
        "rate too low",
        0.5,
        "answers moved by < {} nats",
        "TBD",
        "raise optimizer.learning_rate, ten times at first",
        rate_low,
    ),
    Sign(
        "rate too high",
        1.0,
        "TBD",
        "TBD",
        "lower optimizer.learning_rate, ten times at first",
        rate_high,
    ),
    Sign(
        "chosen answers fall",
        0.5,
        "chosen answers lose > {} nats a token while the margin is positive",
        "some fall is usual (Pal et al., 2024; Razin et al., 2024); runs whose answers stay readable "
        "stay below 0.2",
        "set dpo.sft_weight to 1, use dpop, or lower optimizer.learning_rate",
        chosen_falls,
    ),
    Sign(
        "accuracy at chance",
        2,
        "reward accuracy over the second half of the run < 0.5 + {} standard errors",
        "an accuracy of coin tosses stays below it in 98 of 100 runs",
        "check that prompts and answers belong together and labels are right; then raise "
        "optimizer.learning_rate",
        at_chance,
    ),
    Sign(
        "margins explode",
        1,
        "margin >= {} and loss above that of the start",
        "TBD",
        "lower dpo.beta (0.01 to 0.5 are usual), or optimizer.learning_rate",
        margins_explode,
    ),
    Sign(
        "gradient spikes",
        10,
        "largest gradient norm >= {} x the median",
        "an order of magnitude above what is usual; clipping at optimizer.max_grad_norm hides it",
        "lower optimizer.learning_rate, lengthen the warm-up, or read the rows of that update",
        gradient_spikes,
    ),
    Sign(
        "held-out pairs apart",
        0.1,
        "training accuracy - held-out accuracy >= {} + 2 standard errors, and held-out loss above "
        "its least",
        "a gap that the number of held-out pairs does not explain",
        "train fewer epochs, raise dpo.beta, or lower optimizer.learning_rate",
        held_out_apart,
    ),
    Sign(
        "longer preferred",
        0.2,
        "share of pairs in which the longer answer has the larger reward >= that of the labels + {}",
        "TBD",
        "use dpo.loss_type sigmoid_norm or dpo.ld_alpha",
        longer_preferred,
    ),
)
TOLD_WITH_DATA = ("answers cut", "held-out leaked")  # told when the data are read
