"""Chunked log-probabilities against full logits."""

from __future__ import annotations

import time

import numpy as np


def core() -> list[dict[str, object]]:
    """Time and memory of log-probabilities and gradient, 4 rows of 512 tokens, both ways."""
    import jax
    import jax.numpy as jnp

    from easyaira.losses import token_logps

    def full(hidden, head, tokens, wanted):
        logits = jnp.einsum(
            "rtd,dv->rtv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        logps = jax.nn.log_softmax(logits[:, :-1])
        logps = jnp.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0]
        return (logps * wanted[:, 1:]).sum()

    def logps(hidden, head, tokens, wanted):
        return token_logps.token_logps(
            hidden, head, tokens, wanted, vocab_size=50257, cap=None
        ).logps.sum()

    def nll(hidden, head, tokens, wanted):
        return token_logps.token_nll(hidden, head, tokens, wanted, vocab_size=50257, cap=None)[0]

    rows = []
    for width, dtype in ((256, "float32"), (768, "float32"), (768, "bfloat16")):
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (4, 512, width), dtype)
        head = jax.random.normal(keys[1], (width, 50304)) * 0.02
        tokens = jax.random.randint(keys[2], (4, 512), 0, 50257)
        for share in (1.0, 0.6):
            wanted = jnp.broadcast_to(jnp.arange(512) >= (1 - share) * 512, (4, 512))
            given = (hidden, head, tokens, wanted)
            row = {"width": width, "dtype": dtype, "tokens with loss": share}
            steps = {
                name: jax.jit(jax.value_and_grad(of, argnums=(0, 1))).lower(*given).compile()
                for name, of in (("full", full), ("logps", logps), ("nll", nll))
            }
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(4):  # alternating; the first round is warm-up
                for name, step in steps.items():
                    begin = time.process_time()
                    jax.block_until_ready(step(*given))
                    seconds[name].append(time.process_time() - begin)
            for name, step in steps.items():
                row[f"{name} CPU s"] = float(np.median(seconds[name][1:]))
                row[f"{name} MiB"] = step.memory_analysis().temp_size_in_bytes / 2**20
            rows.append(row)
    return rows
