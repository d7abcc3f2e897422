"""Sections of RewardBench: Lambert et al. (2024), RewardBench, sections 4.1 and 4.2."""

from __future__ import annotations

from collections.abc import Mapping

SECTIONS = {
    "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med",
    "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
    "llmbar-adver-GPTOut llmbar-adver-manual",
    "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond "
    "donotanswer",
    "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust",
}
WEIGHTS = {"math-prm": 984 / 447}  # of a pair: mathematics counts as much as code
OVERALL = "RewardBench"


def sections(groups: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Accuracy of each section over its pairs, and the mean of all four.

    Args:
        groups: pairs and accuracy by subset, see `Judged.by_group`.

    Returns:
        Nothing, unless every group is a subset of RewardBench. A section without a subset is left
        out, and the mean with it. The mean is without RewardBench's prior sets.
    """
    of = {subset: name for name, subsets in SECTIONS.items() for subset in subsets.split()}
    if not groups or not groups.keys() <= of.keys():
        return {}
    accuracies = {}
    for name, subsets in SECTIONS.items():
        own = [subset for subset in subsets.split() if subset in groups]
        weights = [WEIGHTS.get(subset, 1.0) * groups[subset]["examples"] for subset in own]
        if own:
            right = sum(w * groups[s]["accuracy"] for w, s in zip(weights, own, strict=True))
            accuracies[name] = right / sum(weights)
    if len(accuracies) == len(SECTIONS):
        accuracies[OVERALL] = sum(accuracies.values()) / len(SECTIONS)
    return accuracies
