"""The optimizer and schedule of training, in PyTorch."""

import numpy as np
import torch

from helpers.runs import STEPS


def torch_adamw(model):
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1.0)


def torch_rate(step, steps=STEPS["sft"]):
    """Linear warm-up over 3 updates, then cosine decay to 0."""
    if step < 3:
        return 1e-3 * step / 3
    return 1e-3 * 0.5 * (1 + np.cos(np.pi * (step - 3) / (steps - 3)))


def torch_step(model, adamw, loss, rate):
    adamw.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in adamw.param_groups:
        group["lr"] = rate
    adamw.step()
    return norm.item()
