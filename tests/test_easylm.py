"""EasyLM's checkpoints become Hugging Face folders; damaged ones are refused in one line."""

import json

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from easyaira import cli, convert
from easyaira.errors import WeightsError
from easyaira.export import torch_check
from easyaira.hf.easylm import open_stream
from helpers import easylm, tiny

CONFIG = tiny.CASES["llama-theta-eps-head"]  # of a head dimension of its own, and grouped heads
HEAD, THETA, EPS = CONFIG["head_dim"], CONFIG["rope_theta"], CONFIG["rms_norm_eps"]


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
    out = converted(easylm.stream(easylm.params_of(rounded, HEAD)), like, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
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
    params = easylm.params_of(state, HEAD)
    model = AutoModelForCausalLM.from_pretrained(converted(easylm.stream(params), like, tmp_path))
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 24)
    with torch.no_grad():
        logits = model(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, forward(params, tokens), atol=1e-5, rtol=1e-5)
    wrong = {k: v[:, ::-1] if k[-2:] == ("wk", "kernel") else v for k, v in params.items()}
    assert np.abs(logits - forward(wrong, tokens)).max() > 0.1


def test_a_train_state_gives_its_parameters(state, like, tmp_path):
    """Also arrays above 1 GiB, which Flax cuts into chunks: here above 64 bytes."""
    params = {
        ("params", "params", *key): value for key, value in easylm.params_of(state, HEAD).items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
        content = easylm.stream(
            {("step",): np.int32(7), ("opt_state", "0", "mu"): np.ones(3)} | params
        )
    out = converted(content, like, tmp_path)
    for name, tensor in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name], err_msg=name)
    assert r"Converted from streaming\_params" in (out / "README.md").read_text()


def test_a_reward_model_keeps_its_head(tmp_path):
    config = tiny.scorer(CONFIG)
    tiny.save_config(tmp_path / "like", config)
    state = {name: p.numpy() for name, p in tiny.torch_model(config).state_dict().items()}
    out = converted(easylm.stream(easylm.params_of(state, HEAD)), tmp_path / "like", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name], err_msg=name)


WQ = ("transformer", "h", "1", "attention", "wq", "kernel")


def record(value, key=WQ) -> bytes:
    return msgpack.packb((key, value))


def array(*fields, kind=1) -> bytes:
    """A record with an array of Flax that holds these fields."""
    return record(msgpack.packb(msgpack.ExtType(kind, msgpack.packb(fields))))


BROKEN = {  # content that stands alone -> the reason
    "is empty": b"",
    "expected a list, found 0x61": b"another file",
    "expected a pair of key and array": msgpack.packb((WQ, b"", b"")),
    "a text of length 999; at most 256": record(b"", ["x" * 999]),
    "a list of length 99; at most 16": record(b"", ["x"] * 99),
    "4294967295 bytes must follow, 0 do": msgpack.packb(WQ).join(
        [b"\x92", b"\xc6\xff\xff\xff\xff"]
    ),
    "a list of length 4294967295; at most 16": b"\x92\xdd\xff\xff\xff\xff",
    "expected a text, found 0x01": record(b"", [1]),
    "byte 2: a text that is not UTF-8": b"\x92\x91\xa1\xff\xc4\x00",
    "a longer key, or more of them": record(b"", ["x" * 200] * 2),
    "has no array": record(b""),
    "is not an array of Flax": array([1], "float32", bytes(4), kind=3),
    "an array of 'object'": array([1], "object", bytes(4)),
    "an array of 'int8'": array([4], "int8", bytes(4)),
    "shape [2, 3] needs 24 bytes, 4 are stored": array([2, 3], "float32", bytes(4)),
    f"needs {4 * (2**64 - 1) ** 2} bytes, 4 are stored": array(
        [2**64 - 1, 2**64 - 1], "float32", bytes(4)
    ),
    "a list of length 9; at most 8": array([1] * 9, "float32", bytes(4)),
    "expected a number, found 0xff": array([-1], "float32", bytes(4)),
    "transformer/h/1/attention/wq/kernel occurs twice": 2 * array([1], "float32", bytes(4)),
    "bytes follow the array": record(flax.serialization.to_bytes(np.ones(2, np.float32)) + b"more"),
    "not a regular file": None,
}


def refusal(content, like, tmp_path, capsys) -> str:
    """The one line of a refusal, after which there is no folder."""
    with pytest.raises(SystemExit) as end:
        converted(content, like, tmp_path)
    line = capsys.readouterr().err.rstrip("\n")
    assert end.value.code == 2 and line.startswith("error: ") and "\n" not in line, line
    assert len(line) < 500 and "streaming_params: " in line
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    return line


def test_the_notation_of_easylm_is_understood(state, like, tmp_path):
    converted(easylm.stream(easylm.params_of(state, HEAD)), like, tmp_path)
    file = tmp_path / "streaming_params"
    for kind in ("params", "trainstate_params"):
        assert open_stream(f"{kind}::{file}").keys() == open_stream(str(file)).keys()
    for place in (f"flax_params::{file}", "params::gs://bucket/streaming_params"):
        with pytest.raises(WeightsError, match=f"{place}: expected a local file of EasyLM's"):
            open_stream(place)


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_stream_is_refused_in_one_line(reason, like, tmp_path, capsys, monkeypatch):
    content = BROKEN[reason]
    if content is None:
        (tmp_path / "streaming_params").mkdir()
        monkeypatch.setattr(type(tmp_path), "write_bytes", lambda *_: None)
        content = b""
    assert reason in refusal(content, like, tmp_path, capsys)


def test_other_weights_are_refused_in_one_line(state, like, tmp_path, capsys):
    params = easylm.params_of(state, HEAD)
    nan = np.full_like(params[WQ], np.nan)
    for changed, reason in (
        ({k: v for k, v in params.items() if k != WQ}, f"missing {'/'.join(WQ)}"),
        (params | {("lora",): np.ones(2, "f")}, "unknown to this architecture lora"),
        (params | {WQ: params[WQ][:-1]}, f"{'/'.join(WQ)} has shape [15, 32], config.json exp"),
        (params | {WQ: nan}, f"{'/'.join(WQ)}: contains NaN or infinity"),
    ):
        assert reason in refusal(easylm.stream(changed), like, tmp_path, capsys)
    content = easylm.stream(params)
    assert "bytes must follow" in refusal(content[: len(content) // 2], like, tmp_path, capsys)


def test_another_architecture_is_refused_in_one_line(state, tmp_path, capsys):
    for case, kind in (("qwen3", "of type qwen3, and"), ("llama-3.1", "with model/layers/")):
        tiny.save_config(tmp_path / case, tiny.CASES[case])
        with pytest.raises(SystemExit):
            converted(b"", tmp_path / case, tmp_path)
        line = capsys.readouterr().err
        assert f"{case}: describes a model {kind}" in line and line.count("\n") == 1
