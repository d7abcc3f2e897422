"""Losses of TRL's GRPO and RLOO trainers on fixed log-probabilities, for tests/test_on_policy.py.

    PYTHON_WITH_TRL scripts/parity_rl.py     prints {"trl": version, "grpo-None-0.3": loss, ...}

The trainers' `_compute_loss` runs on the test's arrays in the place of a model's.
"""

import json
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

B, C = 6, 5
LENGTHS = np.array([5, 1, 3, 2, 5, 4])
RUNS = {
    "grpo-None-0.3": ("dapo", 0.3, 0.28),
    "grpo-None-0.0": ("dapo", 0.0, 0.2),
    "grpo-grpo-0.3": ("grpo", 0.3, 0.2),
    "grpo-dr_grpo-0.3": ("dr_grpo", 0.3, 0.2),
    "rloo-None-0.3": (None, 0.3, 0.2),
}


class Metrics(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


def arrays():
    """Those of the test."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(-2, 0.5, (B, C)).astype(np.float32) for _ in range(3)]
    return [torch.tensor(x) for x in (*arrays, rng.normal(0, 1, B).astype(np.float32))]


def loss_of(loss_type, beta, epsilon_high):
    logps, old, ref, advantages = arrays()
    mask = torch.tensor(np.arange(C) < LENGTHS[:, None]).int()
    trainer = SimpleNamespace(
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        max_completion_length=C,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": Metrics()},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros(B, C), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, C, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "old_logps": (old * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }
    kind = RLOOTrainer if loss_type is None else GRPOTrainer
    return float(kind._compute_loss(trainer, None, inputs))


if __name__ == "__main__":
    losses = {name: loss_of(*options) for name, options in RUNS.items()}
    print(json.dumps({"trl": trl.__version__} | losses, indent=2))
