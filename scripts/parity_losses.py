"""Preference losses and their gradients against those of TRL, on random log-probabilities.

    python scripts/parity_losses.py --trl PYTHON      # Python of an environment that has TRL

Both sides get the log-probabilities of the tokens of 16 pairs, of the policy and of the reference.
Prints the largest differences of loss and gradient, relative to the largest value or to 1, and
fails above 1e-5, in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.algorithms.dpo import PairScores, dpo_sums
from easyaira.config.dpo import DPOConfig

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
        "ld_alpha": None, "use_weighting": False, "precompute_ref_logps": True,
        "aux_loss_enabled": False,
    }  # fmt: skip
    return usual | options


def cases() -> dict[str, tuple[DPOConfig, dict[str, Any]]]:
    """Our configuration and TRL's options, by name."""
    table = {}
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


def our_loss(config: DPOConfig, logps, ref, mask) -> tuple[float, np.ndarray]:
    """The loss, and its gradient for the log-probability of each token."""

    def pairs(values: jax.Array) -> jax.Array:  # [2 B, T] -> [B, 2]
        return (values * mask).sum(1).reshape(2, PAIRS).T

    def mean(logps):
        ones = pairs(jnp.ones_like(logps))
        free = config.reference == "none"
        policy = PairScores(pairs(logps), ones, ones, ones)
        total, count = dpo_sums(policy, pairs(ref) * (not free), config)["loss"]
        return total / count

    loss, gradient = jax.value_and_grad(mean)(jnp.asarray(logps, jnp.float32))
    return float(loss), np.asarray(gradient)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", metavar="PYTHON", required=True)
    python = parser.parse_args(argv).trl
    rng = np.random.default_rng(0)
    shape = (2 * PAIRS, LENGTH)
    logps, ref = (-np.abs(rng.normal(0, 1, shape)).astype(np.float32) for _ in range(2))
    lengths = rng.integers(1, LENGTH + 1, shape[0])
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(int)
    table = cases()
    job = {"logps": logps.tolist(), "ref": ref.tolist(), "mask": mask.tolist()}
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
        loss, gradient = our_loss(config, logps, ref, mask)
        wanted = np.array(answer["gradient"])
        of_loss = abs(loss - answer["loss"]) / max(abs(answer["loss"]), 1)
        of_gradient = np.abs(gradient - wanted).max() / max(np.abs(wanted).max(), 1)
        print(f"{name:40} loss {of_loss:.0e}  gradient {of_gradient:.0e}")
        wrong += [name] if not max(of_loss, of_gradient) <= TOLERANCE else []
    if wrong:
        sys.exit("beyond the tolerance: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
