"""EasyLM's checkpoints become Hugging Face folders; damaged ones are refused in one line."""

import json

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from easyaira import cli, convert
from easyaira.export import torch_check
from helpers import tiny

CONFIG = tiny.CASES["llama-theta-eps-head"]  # of a head dimension of its own, and grouped heads
HEAD, THETA, EPS = CONFIG["head_dim"], CONFIG["rope_theta"], CONFIG["rms_norm_eps"]
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


def as_easylm(state: dict[str, np.ndarray]) -> dict[tuple, np.ndarray]:
    """Hugging Face's tensors under EasyLM's keys, as its `convert_hf_to_easylm` makes them."""
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
            heads = tensor.reshape(out // HEAD, 2, HEAD // 2, inner)
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


def forward(params: dict[tuple, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] as EasyLM computes them: neighbouring features are one complex number each."""
    by_name = {"/".join(key[:-1]): value.astype(np.float64) for key, value in params.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * by_name[name]

    count = len(tokens)
    frequencies = THETA ** -(np.arange(0, HEAD, 2) / HEAD)
    turn = np.exp(1j * np.arange(count)[:, None] * frequencies)[:, None]

    def heads(x, kernel):
        return (x @ kernel).reshape(count, -1, HEAD)

    def rotated(x):
        return turn * (x[..., 0::2] + 1j * x[..., 1::2])

    x = by_name["transformer/wte"][tokens]
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"transformer/h/{layer}/"
        inner = norm(x, at + "attention_norm")
        q, k, v = (heads(inner, by_name[f"{at}attention/w{name}"]) for name in "qkv")
        k, v = (np.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))
        scores = np.einsum("qhn,khn->hqk", rotated(q), rotated(k).conj()).real / np.sqrt(HEAD)
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khn->qhn", weights, v).reshape(count, -1)
        x = x + attended @ by_name[at + "attention/wo"]
        inner = norm(x, at + "ffn_norm")
        gate = inner @ by_name[at + "feed_forward/w1"]
        up = inner @ by_name[at + "feed_forward/w3"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ by_name[at + "feed_forward/w2"]
    return norm(x, "transformer/ln_f") @ by_name["lm_head"]


@pytest.fixture(scope="module")
def state():
    """A model's tensors under Hugging Face's names."""
    return {name: p.numpy() for name, p in tiny.torch_model(CONFIG).state_dict().items()}


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    """A folder with config.json and tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("like")
    tiny.save_config(folder, CONFIG)
    return folder


@pytest.fixture(autouse=True)
def no_other_process(monkeypatch):
    skipped = {"compared": False, "why": "this file compares"}
    monkeypatch.setattr(torch_check, "compare_logits", lambda *_, **__: skipped)


def converted(content, like, tmp_path, *options):
    (tmp_path / "streaming_params").write_bytes(content)
    out = tmp_path / "out"
    arguments = ["from_easylm", tmp_path / "streaming_params", like, out, *options]
    cli.run_command(convert.main, [str(a) for a in arguments])
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_hugging_faces_bit_for_bit(dtype, state, like, tmp_path):
    rounded = {name: x.astype(ml_dtypes.finfo(dtype).dtype) for name, x in state.items()}
    out = converted(stream(as_easylm(rounded)), like, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    tensors = model.state_dict()
    assert tensors.keys() == rounded.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == getattr(torch, dtype)
        wanted = rounded[name].view(np.uint8)
        np.testing.assert_array_equal(tensor.view(torch.uint8).numpy(), wanted, err_msg=name)
    config = json.loads((out / "config.json").read_text())
    assert config == CONFIG | {"torch_dtype": dtype} and (out / "tokenizer.json").exists()


def test_logits_are_those_that_easylm_computes(state, like, tmp_path):
    params = as_easylm(state)
    model = AutoModelForCausalLM.from_pretrained(converted(stream(params), like, tmp_path))
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 24)
    with torch.no_grad():
        logits = model(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, forward(params, tokens), atol=1e-5, rtol=1e-5)
    wrong = {k: v[:, ::-1] if k[-2:] == ("wk", "kernel") else v for k, v in params.items()}
    assert np.abs(logits - forward(wrong, tokens)).max() > 0.1
