"""Evidence of illness in the metrics of updates.

Each function takes a run and the limit of its sign, and returns the evidence, or None."""

from __future__ import annotations

import math

from easyaira.run.health_facts import FEWEST, Run

SURE = 2  # standard errors
READABLE = 0.2  # nats per token: models whose answers stay readable are no further from their start
TWICE = 2.0  # a pair's weight in the gradient, s(-margin), is 1/2 at first and at most 1
RISEN = 1.1  # times the loss before the first update


def rate_low(run: Run, limit: float) -> str | None:
    if not run.learned or not run.reference or not run.half:
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
    if run.moved is None or abs(run.moved) < READABLE or "loss" not in run.start:
        return None
    losses, start = [row["loss"] for row in run.learned], run.start["loss"]
    risen = sum(loss > RISEN * start for loss in losses)
    if risen < limit * len(losses):
        return None
    return (
        f"The loss was above {start:.3g}, that of the start, in {risen} of {len(losses)} logged "
        f"updates, up to {max(losses):.3g}, while log-probabilities moved by {abs(run.moved):.2g} "
        "nats a token, so the steps are too long"
    )


def chosen_falls(run: Run, limit: float) -> str | None:
    if run.moved is None or -run.moved <= limit or run.last["rewards/margins"] <= 0:
        return None
    return (
        f"The margin grows to {run.last['rewards/margins']:.2g}, but chosen answers lose "
        f"{-run.moved:.2g} nats a token, more than the little that is usual, so other texts become "
        "likely"
    )


def at_chance(run: Run, limit: float) -> str | None:
    if not run.learned or not run.half:
        return None
    accuracy = run.late["rewards/accuracies"]
    first = run.learned[len(run.learned) // 2 - 1]
    pairs = run.batch * (run.learned[-1]["step"] - first["step"])
    bound = 0.5 + limit * 0.5 / math.sqrt(max(pairs, 1))
    if accuracy >= bound:
        return None
    return (
        f"Reward accuracy is {accuracy:.2f} over the last {pairs:,} pairs, which is no more than "
        f"chance ({bound:.2f})"
    )


def margins_explode(run: Run, limit: float) -> str | None:
    late = run.late
    if not late or "loss" not in run.start:
        return None
    loss, margin, start = late["loss"], late["rewards/margins"], run.start["loss"]
    if loss < start or margin < limit:
        return None
    return (
        f"The margin grew to {margin:.3g}, but the loss to {loss:.3g} from {start:.3g}, so pairs "
        "with large negative margins decide the updates"
    )


def gradient_spikes(run: Run, limit: float) -> str | None:
    norms = [row["grad_norm"] for row in run.learned if "grad_norm" in row]
    if len(norms) < 2 * FEWEST:
        return None
    usual, largest = sorted(norms)[len(norms) // 2], max(norms)
    first = [row["grad_norm"] for row in run.rows if "grad_norm" in row][:FEWEST]
    if largest < max(limit * usual, TWICE * max(first)):
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
    longer = run.late.get("rewards/longer") if run.half else None
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
