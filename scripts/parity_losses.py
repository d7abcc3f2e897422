"""Preference losses and their gradients against those of TRL, on random log-probabilities.

    python scripts/parity_losses.py --trl PYTHON      # Python of an environment that has TRL

Both sides get the log-probabilities of the tokens of 16 pairs, of the policy and of the reference,
or the scores of their answers.
Prints the largest differences of loss and gradient, relative to the largest value or to 1, and
fails above 1e-5, in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.algorithms.dpo import AnswerScores, sums_of
from easyaira.config.algorithms import RewardConfig
from easyaira.config.dpo import DPOConfig
from easyaira.losses import preference
from easyaira.losses.scores import bradley_terry, centering

PAIRS, LENGTH, TOLERANCE = 16, 12, 1e-5
DPO = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "apo_down", "exo_pair")
DPO += ("nca_pair", "bco_pair", "sppo_hard", "discopop")
SMOOTHED = {"robust": 0.1, "exo_pair": 0.1}
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
BETA = 0.3


def theirs(**options: Any) -> dict[str, Any]:
    """Attributes of TRL's DPOTrainer."""
    usual = {
        "trainer": "dpo", "beta": BETA, "loss_types": ["sigmoid"], "loss_weights": [1.0],
        "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None, "use_weighting": False, "precompute_ref_logps": False,
        "aux_loss_enabled": False,
    }  # fmt: skip
    return usual | options


def cases() -> dict[str, tuple[DPOConfig | RewardConfig, dict[str, Any]]]:
    """Our configuration and TRL's options, by name."""
    table: dict[str, tuple[DPOConfig | RewardConfig, dict[str, Any]]] = {}
    for name in DPO:
        smoothing = SMOOTHED.get(name, 0.0)
        ours = DPOConfig(name, beta=BETA, label_smoothing=smoothing)
        table[name] = ours, theirs(loss_types=[name], label_smoothing=smoothing)
    for kind in DIVERGENCES:
        for name in ("sigmoid", "ipo", "hinge", "sigmoid_norm", "discopop"):
            ours = DPOConfig(name, beta=BETA, f_divergence_type=kind)
            options = theirs(loss_types=[name], f_divergence_type=kind)
            table[f"{name}, {kind}"] = ours, options
    pair = ["sigmoid", "bco_pair"]
    ours = DPOConfig(pair, [0.8, 0.2], beta=BETA)
    table["0.8 sigmoid + 0.2 bco_pair"] = ours, theirs(loss_types=pair, loss_weights=[0.8, 0.2])
    ours = DPOConfig(beta=BETA, ld_alpha=0.4)
    table["sigmoid, ld_alpha 0.4"] = ours, theirs(ld_alpha=0.4)
    ours = DPOConfig(["sigmoid", "apo_zero"], beta=BETA, use_weighting=True)
    options = theirs(loss_types=ours.loss_type, loss_weights=[1.0, 1.0], use_weighting=True)
    table["sigmoid + apo_zero, use_weighting"] = ours, options
    ours = DPOConfig("kto", beta=BETA, kto_group=PAIRS, undesirable_weight=1.5)
    table["kto, undesirable_weight 1.5"] = ours, {"trainer": "kto", "beta": BETA, "weight": 1.5}
    for center in (0.0, 0.1):
        ours = RewardConfig(center_rewards_coefficient=center)
        name = f"reward with margins, center_rewards_coefficient {center:g}"
        table[name] = ours, {"trainer": "reward", "center": center}
    free = {"reference": "none", "beta": BETA}
    cpo = {"trainer": "cpo", "beta": BETA, "label_smoothing": 0.0, "alpha": 0.0}
    table["simpo"] = (
        DPOConfig("simpo", simpo_gamma=0.7, **free),
        cpo | {"loss_type": "simpo", "simpo_gamma": 0.7},
    )
    table["sigmoid, no reference (CPO)"] = DPOConfig(**free), cpo | {"loss_type": "sigmoid"}
    table["hinge, no reference (SLiC)"] = DPOConfig("hinge", **free), cpo | {"loss_type": "hinge"}
    orpo = {"trainer": "orpo", "beta": BETA, "loss_type": "orpo"}
    table["orpo"] = DPOConfig("orpo", sft_weight=1e-30, **free), orpo
    return table


def our_loss(config: DPOConfig | RewardConfig, **arrays: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss, and its gradient for the log-probability of each token or for each score."""
    of_scores = isinstance(config, RewardConfig)
    mean = partial(mean_of_scores if of_scores else mean_of_logps, config, **arrays)
    loss, gradient = jax.value_and_grad(mean)(arrays["scores" if of_scores else "logps"])
    return float(loss), np.asarray(gradient)


def mean_of_logps(config, given, *, ref, mask, squares, **_):
    answers = np.broadcast_to(np.arange(2 * PAIRS)[:, None], mask.shape)  # chosen, then rejected
    layout = mask == 1, answers % PAIRS + 1, answers // PAIRS + 1
    pairs = partial(preference.answer_sums, examples=PAIRS)
    lengths = pairs(jnp.ones_like(given), *layout)
    sums = pairs(given, *layout, tail=config.tail)
    policy = AnswerScores(sums, lengths, lengths, lengths, pairs(given - squares, *layout))
    ref_logps = pairs(ref, *layout, tail=config.tail) * (config.reference == "model")
    numbers = {"labels": jnp.arange(PAIRS) % 2} if config.unpaired else {}
    total, count = sums_of(config)(policy, ref_logps, config, **numbers)["loss"]
    return total / count


def mean_of_scores(config, given, *, margins, **_):
    both = given[:PAIRS], given[PAIRS:]
    losses = bradley_terry(*both, margin=margins)
    return (losses + config.center_rewards_coefficient * centering(*both)).mean()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", metavar="PYTHON", required=True)
    python = parser.parse_args(argv).trl
    rng = np.random.default_rng(0)
    shape = (2 * PAIRS, LENGTH)
    logps, ref, squares = (-np.abs(rng.normal(0, 1, shape)).astype(np.float32) for _ in range(3))
    ref *= np.float32(1.2)  # less likely, so that KL estimates are above 0
    lengths = rng.integers(1, LENGTH + 1, shape[0])
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(int)
    table = cases()
    arrays = {"logps": logps, "ref": ref, "mask": mask, "squares": squares}
    arrays["scores"] = rng.normal(0, 1, shape[0]).astype(np.float32)
    arrays["margins"] = rng.uniform(0, 1, PAIRS).astype(np.float32)
    job: dict[str, Any] = {name: values.tolist() for name, values in arrays.items()}
    job["options"] = [options for _, options in table.values()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        script = Path(__file__).with_name("parity_trl.py")
        done = subprocess.run([python, str(script), str(file)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed: {done.stderr[-2000:]}")
    wrong = []
    for (name, (config, _)), answer in zip(table.items(), json.loads(done.stdout), strict=True):
        loss, gradient = our_loss(config, **arrays)
        wanted = np.array(answer["gradient"])
        of_loss = abs(loss - answer["loss"]) / max(abs(answer["loss"]), 1)
        of_gradient = np.abs(gradient - wanted).max() / max(np.abs(wanted).max(), 1)
        print(f"{name:50} loss {of_loss:.0e}  gradient {of_gradient:.0e}")
        wrong += [name] if not max(of_loss, of_gradient) <= TOLERANCE else []
    if wrong:
        sys.exit("beyond the tolerance: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
