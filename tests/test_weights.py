"""Reading and writing safetensors: what is wrong is named before anything is loaded."""

import json
import os
import re
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easyaira import convert
from easyaira.distributed.mesh import make_mesh
from easyaira.errors import ConfigError, TokenizerError, UnsafeInputError, WeightsError
from easyaira.hf import safetensors, transfer
from easyaira.models import layers
from easyaira.models.layers import ACTIVATIONS
from easyaira.models.model import resize
from easyaira.models.registry import model_of
from easyaira.storage.pretrained import Pretrained, find
from helpers import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.save(tmp_path, tiny.CONFIGS["llama"])
    return tmp_path


def check(folder):
    origin = Pretrained(str(folder), folder)
    model = model_of(origin.config, str(folder))
    origin.check(model)
    return model, origin


def change(folder, **tensors):
    """Replace tensors of model.safetensors; None removes one."""
    file = folder / "model.safetensors"
    held = load_file(file) | tensors
    save_file({k: v for k, v in held.items() if v is not None}, file, metadata={"format": "pt"})


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({NORM: None}, "missing model.norm.weight"),
        ({NORM: np.ones(17, np.float32)}, r"model.norm.weight has shape \[17\].*expects \[16\]"),
        ({"extra.weight": np.ones(3, np.float32)}, "unknown to this architecture extra.weight"),
        ({NORM: np.ones(16, np.int64)}, "model.norm.weight is stored as I64, which is not read"),
    ],
)
def test_missing_misshapen_and_extra_tensors_are_named(folder, tensors, message):
    change(folder, **tensors)
    with pytest.raises(WeightsError, match=message):
        check(folder)


def test_all_problems_come_in_one_message(folder):
    change(folder, **{NORM: None, "x": np.ones(1, np.float32), "lm_head.weight": np.ones((2, 2))})
    with pytest.raises(WeightsError, match="missing.*lm_head.*|missing.*x"):
        check(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(folder, bad):
    change(folder, **{NORM: np.full(16, bad, np.float32)})
    model, origin = check(folder)
    place = re.escape(f"{folder}/model.safetensors: {NORM}: contains NaN or infinity")
    with pytest.raises(WeightsError, match=f"^{place}"):
        origin.load(model, make_mesh("fsdp=1"))


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
def test_norms_of_another_type_than_the_rest_are_read_as_transformers_reads_them(kind, folder):
    import torch
    from transformers import AutoModelForCausalLM

    file = folder / "model.safetensors"
    held = load_file(file)
    mixed = {n: a if "norm" in n else a.astype(jnp.dtype(kind)) for n, a in held.items()}
    save_file(mixed, file, metadata={"format": "pt"})
    model, params = tiny.load(folder)
    ids = np.random.default_rng(0).integers(1, tiny.VOCAB, (2, 9))
    hidden, head = model.apply(params, tiny.layout(ids))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose((hidden @ head)[..., : model.vocab_size], wanted, atol=1e-5)
    origin = Pretrained(str(folder), folder)
    dtypes = origin.stored_dtypes()
    assert origin.is_rounded() == (kind == "float64")
    if kind == "float64":  # of no use: they are trained in float32
        assert dtypes == {"": "float32"}
        return
    assert dtypes.pop("") == kind and set(dtypes.values()) == {"float32"}
    assert all("norm" in name for name in dtypes)
    back = transfer.to_hf(
        params,
        model.rows,
        vocab_size=model.vocab_size,
        dtypes=lambda name: jnp.dtype(dtypes.get(name, kind)),
    )
    assert all(a.tobytes() == mixed[name].tobytes() for name, a in back)  # also when released


def test_types_that_are_not_read_and_pipes_are_named(folder):
    file = folder / "model.safetensors"
    header = json.dumps({NORM: {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}})
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(WeightsError, match=f"{NORM} is stored as F8_E4M3, .* save the model in"):
        check(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(WeightsError, match="not a regular file"):
        check(folder)


@pytest.mark.parametrize("kind", tiny.CASES)
def test_tensors_have_the_names_of_transformers_files(kind, tmp_path):
    """Which need not be those of its modules: other readers know the files."""
    tiny.save(tmp_path, tiny.CASES[kind])
    model, _ = tiny.load(tmp_path)
    rows = transfer.pair_rows(model.shapes, model.rows)
    names = [name for row, leaf in rows for name in row.names(leaf)]
    saved = model.architecture.saved
    assert {saved.get(n, n) for n in names} == set(load_file(tmp_path / "model.safetensors"))


@pytest.mark.slow
def test_a_release_of_gpt_neox_has_the_head_that_every_transformers_reads(tmp_path):
    """Version 4 knows embed_out alone, and would draw a missing head at random."""
    folders = [str(tmp_path / name) for name in ("base", "converted", "released")]
    tiny.save(tmp_path / "base", tiny.CASES["gpt_neox"])
    file = tmp_path / "base/model.safetensors"
    given = load_file(file)
    given["embed_out.weight"] = given["embed_out.weight"].astype(np.float16)  # keeps its dtype
    save_file(given, file, {"format": "pt"})
    convert.main(["from_hf", *folders[:2]])
    convert.main(["to_hf", *folders[1:]])
    released = load_file(tmp_path / "released/model.safetensors")
    assert given.keys() == released.keys()
    assert all(given[name].tobytes() == released[name].tobytes() for name in given)


def test_buffers_of_old_files_are_no_weights(tmp_path):
    tiny.save(tmp_path, tiny.CONFIGS["gpt2"])
    mask = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for i in range(2)}
    change(tmp_path, **mask)
    check(tmp_path)


def test_names_of_old_gpt2_files_lack_their_prefix(tmp_path):
    tiny.save(tmp_path, tiny.CONFIGS["gpt2"])
    wanted = tiny.load(tmp_path)[1]
    file = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    save_file(bare | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, file)
    jax.tree.map(np.testing.assert_array_equal, tiny.load(tmp_path)[1], wanted)


def test_a_tied_head_must_be_the_embedding(tmp_path):
    tiny.save(tmp_path, tiny.CONFIGS["gpt2"])
    table = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    change(tmp_path, **{"lm_head.weight": table})
    check(tmp_path)
    change(tmp_path, **{"lm_head.weight": table + 1})
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        check(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied-mha", "gpt_neox-in-turn"])
def test_a_table_that_is_stored_as_the_tied_head_is_read(kind, tmp_path):
    """safetensors' save_model, which accelerate uses, keeps one name of a shared tensor."""
    tiny.save(tmp_path / "both", tiny.CASES[kind])
    tiny.save(tmp_path / "head", tiny.CASES[kind])
    tensors = load_file(tmp_path / "head/model.safetensors")
    (name,) = (name for name in tensors if re.search(r"wte|embed_tokens|embed_in", name))
    tensors["embed_out.weight" if "neox" in kind else "lm_head.weight"] = tensors.pop(name)
    save_file(tensors, tmp_path / "head/model.safetensors", {"format": "pt"})
    both, head = (tiny.load(tmp_path / name)[1] for name in ("both", "head"))
    jax.tree.map(np.testing.assert_array_equal, both, head)


def test_shards_with_an_index_read_as_one_file(tmp_path):
    tiny.save(tmp_path / "one", tiny.CONFIGS["llama"])
    tiny.save(tmp_path / "many", tiny.CONFIGS["llama"], max_shard_size="20kB")
    assert (tmp_path / "many/model.safetensors.index.json").exists()
    one, many = (tiny.load(tmp_path / name)[1] for name in ("one", "many"))
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_shards_may_hold_masks_and_counters(tmp_path):
    """As large GPT-NeoX models do: integers that the index lists."""
    tiny.save(tmp_path, tiny.CONFIGS["llama"], max_shard_size="20kB")
    wanted = tiny.load(tmp_path)[1]
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    masks = {"model.layers.0.attention.bias": np.ones((1, 1, 4, 4), bool), "ids": np.arange(3)}
    save_file(load_file(tmp_path / first) | masks, tmp_path / first, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(masks, first)
    index_file.write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, wanted, tiny.load(tmp_path)[1])


def test_an_index_is_compared_with_its_files(tmp_path):
    tiny.save(tmp_path, tiny.CONFIGS["llama"], max_shard_size="20kB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first = sorted(set(index["weight_map"].values()))[0]

    def written(**changes):
        file.write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))
        return tmp_path

    with pytest.raises(UnsafeInputError, match="outside"):
        safetensors.open_folder(written(**{NORM: "../" + first}))
    with pytest.raises(WeightsError, match="assigns to another file|is in no file"):
        safetensors.open_folder(written(**{NORM: first}))
    with pytest.raises(WeightsError, match="cannot be read"):
        safetensors.open_folder(written(**{NORM: "a.safetensors"}))
    written()
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="both"):
        safetensors.open_folder(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "header"])
def test_a_damaged_file_is_named(folder, damage):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    damaged = {"cut": content[:-100], "empty": b"", "header": b"\xff" * 8 + content[8:]}
    file.write_bytes(damaged[damage])
    with pytest.raises(WeightsError, match="model.safetensors: cannot be read.*download it again"):
        check(folder)


def test_a_shard_without_its_index_says_what_to_download(folder):
    """It was called a file of another format."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match="several files; download model.safetensors.index.json"):
        check(folder)


def test_a_pickle_is_refused_and_a_bare_config_says_what_to_do(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pytorch_model.bin is of another format.*save_pretr"):
        check(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match="model.init to random"):
        check(folder)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_rotary_frequencies_are_those_of_transformers(kind):
    """Of a real head, 128 wide: a tiny one has too few frequencies to be near every bound."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"llama3": LLAMA3, "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    raw = {"hidden_size": 512, "num_attention_heads": 4, "rope_parameters": rope[kind]}
    theirs, _ = ROPE_INIT_FUNCTIONS[kind](LlamaConfig(**raw), device="cpu")
    config = model_of({"model_type": "llama"} | raw, "a test").config
    cos, _ = layers.rotary(np.ones((1, 1)), 128, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(theirs.numpy()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_windows_hide_something_only_from_texts_longer_than_they_are(kind):
    raw = {"model_type": kind, "num_hidden_layers": 8, "use_sliding_window": False}
    config = model_of(raw | {"sliding_window": 32}, "a test").config
    assert min(config.windows) == 32
    for longest, windows in ((32, None), (33, config.windows), (None, config.windows)):
        assert layers.hiding(config.windows, layers.Compute(max_length=longest)) == windows
    assert model_of(raw | {"sliding_window": None}, "a test").config.windows is None


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "opt2"}, "model_type 'opt2' is not supported"),
        ({"model_type": ["opt"]}, r"model_type \['opt'\] is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "rope_parameters": None}, "rope_type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of linear is None; expected a pos"),
        ({"rope_parameters": LLAMA3 | {"factor": "8"}}, "factor of llama3 is '8'"),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4}},
            "low_freq_factor 4 is not below high_freq",
        ),
        ({"attention_bias": 1}, "attention_bias is 1; expected bool"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"hidden_act": "swish2"}, "activation 'swish2'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 3, "head_dim": None}, "width 16 is not a multiple of 3 heads"),
        ({"num_key_value_heads": 3}, "4 heads are not a multiple of 3 key/value heads"),
        ({"sliding_window": 128}, "sliding_window: 128 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is unknown"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'; expected int"),
        ({"hidden_size": [16]}, r"hidden_size is \[16\]; expected int"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0; expected int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected bool"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; expected int"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; expected float"),
        ({"rope_parameters": 5}, "rope_parameters is 5; expected an object"),
        (
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
            "rope_parameters has full_attention, sliding_attention; expected rope_theta and rope_t",
        ),
        ({"architectures": "LlamaModel"}, "architectures is 'LlamaModel'; expected a list"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is unknown"),
        ({"sliding_window": 128, "use_sliding_window": True}, "sliding_window: 128"),
    ],
)
def test_a_config_that_is_not_built_is_refused(folder, values, message):
    set_config(folder, **values)
    with pytest.raises(ConfigError, match=message):
        check(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation_autoset": True},
        {"_flash_attn_2_enabled": True},
        {"attn_implementation": "sdpa"},
        {"auto_map": {"AutoModel": "x.Y"}},
        {"unsloth_version": "2025.3.19", "unsloth_fixed": True},
        {"layer_types": ["full_attention", "full_attention"]},
        {"sliding_window": 256, "use_sliding_window": False},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"hidden_act": "swish"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_keys_that_change_no_number_are_accepted(folder, values):
    set_config(folder, **values)
    check(folder)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 97, dtype=np.float32)
    theirs = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](x), theirs, rtol=1e-5, atol=1e-6)


def test_more_layers_than_tensors_are_refused_before_they_are_listed(folder):
    set_config(folder, num_hidden_layers=10**9)
    with pytest.raises(WeightsError, match="has 1000000000 layers, but only 21 tensors"):
        check(folder)


@pytest.mark.parametrize(
    "index, message",
    [
        ("[" * 200_000, "index.json: cannot be read: not JSON: nested too deeply; download"),
        ('{"weight_map": {"x": 5}}', "weight_map must map tensors to files; download it again"),
        ('{"weight_map": []}', "weight_map must map tensors to files"),
        ("{}", "weight_map must map tensors to files"),
    ],
    ids=["deep", "number", "list", "none"],
)
def test_a_damaged_index_is_named(folder, index, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=message):
        check(folder)


def test_a_config_that_is_a_pipe_is_refused_at_once(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ConfigError, match="config.json: cannot be read: not a regular file"):
        check(folder)


def test_a_released_folder_is_compared_with_its_report_when_it_is_loaded(folder):
    tensors = load_file(folder / "model.safetensors")
    entries = {n: {"sha256": safetensors.tensor_hash(t)} for n, t in tensors.items()}
    report = folder / "export_report.json"
    report.write_text(json.dumps({"tensors": entries}))
    tiny.load(folder)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="model.norm.weight has other values than were exported"):
        tiny.load(folder)
    for damaged in ("{", '{"tensors": {"x": 1}}', "{}"):
        report.write_text(damaged)
        with pytest.raises(WeightsError, match="export_report.json: .*; remove it, or get the ori"):
            tiny.load(folder)
    report.unlink()
    tiny.load(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors"])
def test_a_hub_model_in_another_format_says_how_to_get_safetensors(folder, file, monkeypatch):
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["a.json", file])
    with pytest.raises(ConfigError, match=f"owner/m: has {file} on the hub.*refs/pr/N") as error:
        find("owner/m")
    assert "random" not in str(error.value)
    assert find("owner/m", weights_wanted=False).folder == folder


def test_a_hub_model_is_named_as_it_was_asked_for_and_not_by_its_place(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))

    def location():
        origin = find("ex/model")
        with pytest.raises((ConfigError, WeightsError, TokenizerError)) as error:
            origin.tokenizer()
            origin.check(model_of(origin.config, origin.where))
        assert str(folder) not in str(error.value)
        return str(error.value)

    set_config(folder, strange=3)
    assert location().startswith("ex/model: strange is unknown")
    set_config(folder, strange=None)
    change(folder, **{NORM: None})
    assert location().startswith("ex/model: missing model.norm.weight")
    (folder / "model.safetensors").write_bytes(b"")
    assert location().startswith("ex/model/model.safetensors: cannot be read")
    (folder / "tokenizer.json").write_text("{")
    assert location().startswith("ex/model: no tokenizer could be loaded")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="^ex/model/config.json: cannot be read: not JSON"):
        _ = find("ex/model").config


def test_a_config_that_disagrees_with_the_tensors_is_named_before_any_memory_is_taken(folder):
    set_config(folder, hidden_size=10**7, intermediate_size=10**7)
    with pytest.raises(WeightsError, match="config.json expects"):
        check(folder)


def test_each_device_is_given_its_slice_and_nothing_else_is_read(folder, devices, monkeypatch):
    devices(8)
    read = []
    whole = transfer._read
    monkeypatch.setattr(transfer, "_read", lambda *args: read.append(part := whole(*args)) or part)
    params = tiny.load(folder, "fsdp=4,tp=2")[1]
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 12)
    assert max(part.size for part in read) <= 384 * 16 / 8
    devices(1)
    alone = tiny.load(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, params, alone)


def test_large_models_are_written_in_shards_that_transformers_reads(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model, params = tiny.load(folder)
    tensors = list(tiny.as_theirs(model, params).items())
    out = tmp_path / "out"
    out.mkdir()
    safetensors.save_folder(iter(tensors), out, shard_bytes=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    (out / "config.json").write_text((folder / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in tensors:
        np.testing.assert_array_equal(loaded[name], tensor)


def test_values_beyond_an_export_dtype_are_an_error(folder):
    model, params = tiny.load(folder)
    params["model"]["norm"]["scale"] = params["model"]["norm"]["scale"] * 1e6
    half = lambda name: np.dtype(np.float16)  # noqa: E731
    with pytest.raises(WeightsError, match="model.norm.weight.*float16"):
        list(transfer.to_hf(params, model.rows, vocab_size=300, dtypes=half))


@pytest.mark.parametrize("how", ["mean", "normal"])
@pytest.mark.parametrize("size", [305, 290, 400])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.slow
def test_resize_keeps_old_rows_and_fills_new_ones(kind, size, how, tmp_path):
    tiny.save(tmp_path, tiny.CONFIGS[kind])
    model, params = tiny.load(tmp_path)
    resized, new = resize(model, params, size, how, jax.random.key(0))
    assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, resized.shapes)
    before, after = tiny.as_theirs(model, params), tiny.as_theirs(resized, new)
    kept = min(300, size)
    tables = ["lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"]
    tables += ["model.decoder.embed_tokens.weight"]
    for name in before:
        if name not in tables:
            np.testing.assert_array_equal(before[name], after[name])
            continue
        assert after[name].shape[0] == size
        np.testing.assert_array_equal(after[name][:kept], before[name][:kept])
        if size > 300 and how == "mean":
            wanted = np.broadcast_to(before[name].mean(0), after[name][300:].shape)
            np.testing.assert_allclose(after[name][300:], wanted, rtol=1e-5, atol=1e-6)
        elif size == 400:
            assert 0.018 < after[name][300:].std() < 0.022
    table = next(leaf for leaf in jax.tree.leaves(new) if leaf.shape[0] in (384, 512))
    assert not np.asarray(table[size:]).any()  # the padding stays zero


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.slow
def test_random_weights_are_drawn_as_transformers_draws_them(kind, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny.CONFIGS[kind] | {"vocab_size": 1000}
    settings = {k: v for k, v in config.items() if k != "architectures"}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).state_dict()
    model = model_of(config, "here")
    ours = tiny.as_theirs(model, model.init(jax.random.key(0)))
    for name, tensor in ours.items():
        wanted = theirs[name].numpy()
        if wanted.std() == 0:
            np.testing.assert_array_equal(tensor, wanted)
        else:
            spread = 6 / np.sqrt(2 * tensor.size)  # six standard errors
            assert abs(tensor.std() / wanted.std() - 1) < 2 * spread + 0.01, name
            assert abs(tensor.mean()) < 6 * wanted.std() / np.sqrt(tensor.size)


@pytest.mark.parametrize(
    "config, count",
    [
        ({"model_type": "gpt2"}, 124_439_808),
        ({"model_type": "gpt2", "vocab_size": 50_261}, 124_442_880),  # Aira-2-124M as released
        ({"model_type": "opt"}, 125_239_296),
        ({"model_type": "opt", "vocab_size": 50_270}, 125_237_760),  # Aira-OPT-125M
        (
            {"model_type": "opt", "hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096}
            | {"num_attention_heads": 16, "word_embed_proj_dim": 512}
            | {"do_layer_norm_before": False},
            331_196_416,
        ),
        (
            {"model_type": "opt", "hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192}
            | {"num_attention_heads": 32},
            1_315_758_080,
        ),
        (
            {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824}
            | {"num_hidden_layers": 40, "num_attention_heads": 40},
            13_015_864_320,
        ),
    ],
)
def test_parameters_are_counted_without_padding(config, count):
    assert model_of(config, "here").parameter_count() == count


def test_a_path_is_never_looked_up_on_the_hub(tmp_path):
    for name in ("./nothing", "/nothing/at/all", "~/nothing", "a/b/c"):
        with pytest.raises(ConfigError, match="no such folder; check the path"):
            find(name)
    with pytest.raises(ConfigError, match="not found on the model hub"):
        find("owner/nothing")


def test_a_checkpoint_that_a_run_lacks_is_refused_with_those_that_it_has(tmp_path):
    for step in (5, 30):
        (tmp_path / f"run/checkpoints/{step}").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no such folder; check the path; the run has 5, 30$"):
        find(str(tmp_path / "run/checkpoints/31"))


@pytest.mark.slow
def test_the_package_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import easyaira.run.run, easyaira.algorithms.dpo, "
        "easyaira.convert, easyaira.generate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_and_a_folder_of_models_are_no_model(tmp_path):
    for name in ("a", "b"):
        tiny.save_config(tmp_path / "runs" / name, tiny.CONFIGS["gpt2"])
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("runs/a/config.json", "a/config.json: is a file; name the folder that it is in"),
        ("runs", f"runs: holds no config.json, .* folder, such as {tmp_path}/runs/a$"),
        (
            "empty",
            "empty: holds no config.json, so it is not a model; name a run folder or a Hugging",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            _ = find(str(tmp_path / name)).config
