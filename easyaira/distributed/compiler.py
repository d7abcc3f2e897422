"""Options of XLA's compiler, by platform."""

from __future__ import annotations

REPRODUCIBLE = {
    # cuDNN adds the gradients of queries by atomics unless it is asked for the same bits. A
    # training step has no other operation that this option changes, see tests/test_gpu.py.
    "gpu": {"xla_gpu_exclude_nondeterministic_ops": True},
}
QUICK = {  # for programs that run once: do not time several algorithms for each product
    "gpu": {"xla_gpu_autotune_level": 0},
}
