"""Checkpoints in the form of EasyLM."""

from __future__ import annotations

import flax.serialization
import msgpack
import numpy as np

LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention/wq",
    "self_attn.k_proj": "attention/wk",
    "self_attn.v_proj": "attention/wv",
    "self_attn.o_proj": "attention/wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward/w1",
    "mlp.down_proj": "feed_forward/w2",
    "mlp.up_proj": "feed_forward/w3",
}
REST = {"model.embed_tokens": "transformer/wte", "model.norm": "transformer/ln_f"}


def params_of(state: dict[str, np.ndarray], head: int) -> dict[tuple, np.ndarray]:
    """Hugging Face's tensors under EasyLM's keys, as its `convert_hf_to_easylm` makes them.

    Args:
        head: features of a head.
    """
    params = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            key = f"transformer/h/{layer}/{LAYER[module]}"
        else:
            key = REST.get(module, module)
        if key.endswith(("wq", "wk")):  # undo the permutation of `convert_llama_weights_to_hf`
            out, inner = tensor.shape
            heads = tensor.reshape(out // head, 2, head // 2, inner)
            tensor = heads.transpose(0, 2, 1, 3).reshape(out, inner)
        if tensor.ndim == 2 and "wte" not in key:
            tensor = tensor.T
        kind = "embedding" if "wte" in key else "kernel"
        params[(*key.split("/"), kind)] = np.ascontiguousarray(tensor)
    return params


def stream(params: dict[tuple, np.ndarray]) -> bytes:
    """What StreamingCheckpointer writes."""
    packer = msgpack.Packer()
    return b"".join(
        packer.pack((key, flax.serialization.to_bytes(value))) for key, value in params.items()
    )
