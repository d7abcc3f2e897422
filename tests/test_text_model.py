"""The text model of a model for images or sound, taken out of its folder, against transformers."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
)

from easyaira import cli, convert, train_sft
from easyaira.errors import ConfigError, WeightsError
from easyaira.models.registry import model_of
from helpers import tiny, whole
from helpers.whole import WHOLE

OTHERS = ("vision_tower", "audio_tower", "multi_modal_projector", "image_newline")
CLASSES = {
    "gemma3": "Gemma3ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "llava_next": "LlamaForCausalLM",
    "voxtral": "LlamaForCausalLM",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("published")
    for kind in WHOLE:
        whole.save(root / kind, kind)
    return root


@pytest.fixture
def folder(published, tmp_path):
    """A copy of a folder that a test may change."""

    def copied(kind):
        return shutil.copytree(published / kind, tmp_path / kind)

    return copied


def rewrite(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()) if file.exists() else {})))


def renamed(folder, change):
    """Rename or drop stored tensors; returns what is stored then."""
    file = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, {"format": "pt"})
    return tensors


def newer(name):
    """The names that transformers 4.52 to 4.57 writes."""
    name = name.removeprefix("language_model.")
    if name.startswith("lm_head."):
        return name
    return "model." + (name if name.startswith(OTHERS) else f"language_{name}")


def logits_of(auto, folder, ids):
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("as_saved", [False, True], ids=["published", "newer names, whole config"])
@pytest.mark.parametrize("kind", WHOLE)
def test_the_text_model_computes_what_it_did_among_the_other_parts(
    kind, as_saved, folder, tmp_path, capsys
):
    source, out = folder(kind), tmp_path / "out"
    tied = kind == "gemma3"
    if as_saved:  # transformers adds token ids that no file sets
        settings = WHOLE[kind] | {"tie_word_embeddings": tied}
        AutoConfig.for_model(**settings).save_pretrained(source)
        assert json.loads((source / "config.json").read_text())["text_config"]["eos_token_id"] < 3
        stored = renamed(source, newer)
        assert ("lm_head.weight" in stored) != tied
    else:
        stored = renamed(source, lambda name: name)
        assert "language_model.model.norm.weight" in stored
    convert.main(["text_model", str(source), str(out)])
    parts = sorted(part for part in OTHERS if any(part in name for name in stored))
    count = sum(not any(part in name for part in OTHERS) for name in stored)
    line = f" without {', '.join(parts)}; all {count} tensors equal the stored ones bit for bit"
    assert line in capsys.readouterr().out

    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert type(model).__name__ == CLASSES[kind] and model.dtype == torch.bfloat16
    assert not any(info.values()), info
    written = load_file(out / "model.safetensors")
    kept = {name: t for name, t in stored.items() if not any(o in name for o in OTHERS)}
    assert len(written) == len(kept)
    for name, tensor in kept.items():
        other = written[name.replace("language_model.", "").replace("model.model", "model")]
        assert tensor.dtype == other.dtype and tensor.tobytes() == other.tobytes(), name

    ids = np.random.default_rng(1).integers(1, tiny.VOCAB, (2, 12))
    among = logits_of(AutoModelForMultimodalLM, source, ids)
    assert np.array_equal(logits_of(AutoModelForCausalLM, out, ids), among)
    model, params = tiny.load(out)
    hidden, head = jax.jit(model.apply)(params, tiny.layout(ids))
    difference = np.abs(model.logits(hidden, head) - among).max()
    assert difference <= 1e-5 * max(np.abs(among).max(), 1)

    content = json.loads((out / "config.json").read_text())
    assert content["architectures"] == [CLASSES[kind]] and content["dtype"] == "bfloat16"
    assert content["eos_token_id"] == WHOLE[kind]["eos_token_id"]
    assert content["tie_word_embeddings"] == tied
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == json.loads((source / "generation_config.json").read_text())
    tokenizer, before = (AutoTokenizer.from_pretrained(place) for place in (out, source))
    assert tokenizer.chat_template == "{{ 1 }}" and before.chat_template is None
    assert tokenizer("what do you like?").input_ids == before("what do you like?").input_ids
    assert not list(out.glob("*processor*"))


def test_a_head_follows_the_whole_config_and_the_weights(folder, tmp_path):
    """transformers ties where the whole config says so, which is its default, but for a head that
    is stored and differs."""
    source = folder("mistral3")
    rewrite(source / "config.json", lambda c: c | {"tie_word_embeddings": False})
    convert.text_model(str(source), str(tmp_path / "untied"))
    rewrite(source / "config.json", lambda c: c | {"tie_word_embeddings": True})
    convert.text_model(str(source), str(tmp_path / "differs"))
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors, file, {"format": "pt"})
    convert.text_model(str(source), str(tmp_path / "equal"))
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    convert.text_model(str(source), str(tmp_path / "absent"))
    tied = {}
    for name in ("untied", "differs", "equal", "absent"):
        content = json.loads((tmp_path / name / "config.json").read_text())
        tied[name] = content["tie_word_embeddings"]
        assert tied[name] != ("lm_head.weight" in load_file(tmp_path / name / "model.safetensors"))
    assert tied == {"untied": False, "differs": False, "equal": True, "absent": True}


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda n: "audio.weight" if n.endswith("ln_pre.weight") else n, "audio.weight is neither"),
        (lambda n: None if n.endswith("model.norm.weight") else n, "missing model.norm.weight"),
        (lambda n: "model.norm.weight" if n.endswith("model.norm.weight") else n, "is neither"),
        (
            lambda n: f"language_model.{n}" if n.endswith("0.input_layernorm.weight") else n,
            "unknown to this architecture language_model.model.layers.0.input_layernorm.weight",
        ),
    ],
    ids=["unknown", "missing", "of no part", "a name of none"],
)
def test_other_tensors_than_expected_are_refused_and_nothing_is_written(
    change, error, folder, tmp_path
):
    source = folder("mistral3")
    renamed(source, change)
    with pytest.raises(WeightsError, match=error):
        convert.text_model(str(source), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mistral3"]


def test_a_tensor_under_both_names_is_refused(folder, tmp_path):
    source = folder("mistral3")
    tensors = load_file(source / "model.safetensors")
    twice = tensors["language_model.model.norm.weight"]
    tensors["model.language_model.norm.weight"] = twice
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="model.norm.weight is stored under two names"):
        convert.text_model(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4}


@pytest.mark.parametrize(
    "change, error",
    [
        ({"text_config": {"model_type": "gemma3n_text"}}, "transformers cannot read|not supported"),
        ({"rope_parameters": YARN | {"rope_theta": 500.0}}, "rope_type 'yarn' is not supported"),
        ({"hidden_size": "many"}, "transformers cannot read config.json"),
    ],
    ids=["family", "yarn", "nonsense"],
)
def test_a_text_model_that_is_not_supported_is_refused(change, error, folder, tmp_path):
    source = folder("mistral3")

    def changed(content):
        inner = content["text_config"] | change.get("text_config", change)
        return content | {"text_config": inner}

    rewrite(source / "config.json", changed)
    with pytest.raises(ConfigError, match=error) as raised:
        convert.text_model(str(source), str(tmp_path / "out"))
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mistral3"]


def test_a_folder_without_other_parts_and_one_that_is_there_are_refused(folder, tmp_path, capsys):
    tiny.save_config(tmp_path / "llama", tiny.CONFIGS["llama"])
    with pytest.raises(ConfigError, match="llama: config.json has no text_config"):
        convert.text_model(str(tmp_path / "llama"), str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ConfigError, match="out: is not empty"):
        convert.text_model(str(folder("mistral3")), str(tmp_path / "out"))


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_model_is_refused_with_the_command_that_takes_the_text_out(
    kind, published, tmp_path, capsys
):
    source = str(published / kind)
    rows = tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(4))
    flags = [f"--data.train={rows}", f"--output_dir={tmp_path / 'run'}"]
    train = partial(cli.run_command, train_sft.main)
    with pytest.raises(SystemExit):
        train([f"--model.name_or_path={source}", *flags])
    error = capsys.readouterr().err
    command = f"take its text model out: easyaira convert text_model {source} OUT"
    assert f"{source}: holds a model for more than text, model_type '{kind}'; {command}" in error
    assert not (tmp_path / "run").exists()


def test_a_whole_model_whose_text_part_is_not_supported_is_refused_as_usual():
    for inner in ({}, {"model_type": "bert"}, {"model_type": ["llama"]}):
        with pytest.raises(ConfigError, match="model_type 'clip' is not supported; choose one of"):
            model_of({"model_type": "clip", "text_config": inner}, "clip")
