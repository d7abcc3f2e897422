"""A folder in PEFT's format as a model: with the numbers of peft, and refused in one line."""

import json

import numpy as np
import pytest
import torch

import easyaira
from easyaira import convert, generate
from easyaira.errors import EasyAiraError
from easyaira.storage.pretrained import find
from helpers import runs, tiny
from helpers.adapters import peft_model

IDS = [[3, 70, 71, 5, 9, 200, 17, 4]]
ADDED = [3, 300, 301]  # the vocabulary has 300 tokens


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "target_modules": r".*layers\.\d+\.self_attn\.[qv]_proj"}),
        ("gpt2", {"use_dora": True, "rank_pattern": {"c_fc": 3}, "alpha_pattern": {"c_attn": 9}}),
        ("opt", {"trainable_token_indices": [3, 70]}),
        ("gpt2", {"modules_to_save": ["wte", "lm_head"], "ensure_weight_tying": True}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"], "size": 302}),
        ("gpt2", {"trainable_token_indices": ADDED, "size": 302}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_loaded_adapter_has_the_logits_of_peft(kind, options, models, tmp_path):
    theirs = peft_model(models / kind, kind, **options)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    loaded = easyaira.load(str(tmp_path / "a"), template="plain")
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(IDS)).logits.numpy()
    rows = tiny.layout(np.array(IDS))
    with loaded.model.on(loaded.mesh):
        hidden, head = loaded.model.apply(loaded.params, rows)
        ours = np.asarray(loaded.model.logits(hidden, head))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * max(np.abs(wanted).max(), 1))
    assert loaded.tokenizer.get_vocab() == tiny.tokenizer_of(tiny.CONFIGS[kind]).get_vocab()


@pytest.mark.slow
def test_from_hf_of_an_adapter_writes_the_merged_model(models, tmp_path):
    """Merged weights are arrays in memory, and not `Lazy`."""
    peft_model(models / "llama", "llama").save_pretrained(tmp_path / "a")
    convert.from_hf(str(tmp_path / "a"), str(tmp_path / "ours"))
    (_, merged), (_, ours) = (tiny.load(tmp_path / name) for name in ("a", "ours"))
    runs.same_bits(ours, merged)


@pytest.mark.slow
def test_a_released_adapter_answers_as_its_run(models, data, tmp_path, capsys):
    lora = "r: 4, alpha: 8, target_modules: [c_attn], modules_to_save: [wte]"
    lora = f"--lora={{{lora}, rank_pattern: {{c_attn: 3}}}}"
    options = {"max_steps": 3, "optimizer.warmup_steps": 0, "export": True}
    runs.train("sft", models / "gpt2", data / "sft.jsonl", tmp_path / "run", lora, **options)
    places = [str(tmp_path / name) for name in ("run", "run/hf")]
    run, released = (easyaira.load(place, template="plain") for place in places)
    prompts, answers = ["red fox", "why?"], ["dog", "no"]
    np.testing.assert_array_equal(run.logps(prompts, answers), released.logps(prompts, answers))
    base = easyaira.load(str(models / "gpt2"), template="plain")
    assert (run.logps(prompts, answers) != base.logps(prompts, answers)).all()
    capsys.readouterr()
    for place in places:
        generate.main([place, "--prompt", "red fox", "--max_new_tokens=8",
                       "--template=plain"])  # fmt: skip
    out = capsys.readouterr().out.strip().splitlines()
    assert len(out) == 2 and out[0] == out[1]
    hashes = {find(place).sample() for place in places}
    assert len(hashes | {find(str(models / "gpt2")).sample()}) == 3


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            {"base_model_name_or_path": "gone/../here/now"},
            "a: the base of its adapter, base_",
        ),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: None; name the base"),
        (
            {"task_type": "SEQ_CLS"},
            "makes a scorer of .*; name its run folder",
        ),
        ({"r": "four"}, "r: 'four'; expected a number above 0"),
        ({"lora_alpha": True}, "lora_alpha: True; expected a number above 0"),
        ({"target_modules": [1]}, r"target_modules: \[1\]; expected names of layers"),
        ({"target_modules": ["fc9"]}, "a: lora.target_modules: 'fc9' is not a linear layer"),
        ({"bias": "all"}, "bias: 'all' is not supported"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern: .*; expected numbers by name"),
        ({"modules_to_save": 3}, "modules_to_save: 3; expected a list of names"),
        ({"r": 2}, "has shape .*; expected shape"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_read_is_one_line(change, problem, models, tmp_path):
    peft_model(models / "llama", "llama").save_pretrained(tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(EasyAiraError, match=problem) as error:
        easyaira.load(str(tmp_path / "a"), template="plain")
    assert "\n" not in str(error.value)


def test_an_adapter_has_its_own_tokenizer_and_settings_or_those_of_its_base(models, tmp_path):
    peft_model(models / "gpt2", "gpt2").save_pretrained(tmp_path / "a")
    origin = find(str(tmp_path / "a"))
    assert origin.tokenizer().get_vocab() == find(str(models / "gpt2")).tokenizer().get_vocab()
    assert origin.generation_config == find(str(models / "gpt2")).generation_config
    tiny.tokenizer(310).save_pretrained(tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text('{"top_k": 3}')
    origin = find(str(tmp_path / "a"))
    assert len(origin.tokenizer()) > 300 and origin.generation_config == {"top_k": 3}
