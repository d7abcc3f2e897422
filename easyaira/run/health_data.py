"""Evidence of ill pairs, a wrong start or a wrong reference, before the first update.

Each function takes a run and the limit of its sign, and returns the evidence, or None."""

from __future__ import annotations

import math

from easyaira.run.health_facts import Run


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
    favour = run.start["reference/prefers_chosen"]
    return (
        f"The reference finds the rejected answer by far the likelier one in {against:.0%} of the "
        f"pairs, the chosen one in {favour:.0%}, as if {against / (against + favour):.0%} of the "
        "labels were flipped"
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
