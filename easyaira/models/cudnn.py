"""cuDNN's attention with the same bits in every call, by a private part of JAX.

cuDNN's backward pass adds up the gradients of queries by atomics, in any order, unless a call's
configuration has `force_deterministic`. XLA writes it there under its option
`xla_gpu_exclude_nondeterministic_ops` (see distributed/compiler.py), but only into the first of
several equal calls. It then does not find the programs of the other calls: two layers, or a loop
that XLA unrolls, end in an IndexError at the first update (jaxlib 0.11.2 on an H200). So with
`reproducible`, JAX writes `force_deterministic` into every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax._src.cudnn import fused_attention_stablehlo as fused

CONFIG_OF = "create_dot_product_attention_backend_config_base"


@contextmanager
def reproducible() -> Iterator[None]:
    """Within this context, programs are lowered with reproducible calls of cuDNN's attention.
    Compile them with `compiler.REPRODUCIBLE`."""
    config_of = getattr(fused, CONFIG_OF)

    def with_fixed_order(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = config_of(*args, **kwargs)
        if args[-1] if args else kwargs["is_bwd"]:
            config["cudnn_fmha_backend_config"]["force_deterministic"] = True
        return config

    setattr(fused, CONFIG_OF, with_fixed_order)
    try:
        yield
    finally:
        setattr(fused, CONFIG_OF, config_of)
