"""Model cards: the run's facts and no others, in front matter that the hub reads, whatever names
and texts people give; and the files beside the weights, whose control tokens agree."""

import json
import re
import shutil
from dataclasses import asdict

import jax
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from easyaira import cli, convert, train_dpo, train_sft
from easyaira.algorithms.sft import sft_algorithm
from easyaira.config.dpo import DPOConfig
from easyaira.config.rl import RLConfig
from easyaira.config.run import TrainSFT
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError
from easyaira.evaluation import results
from easyaira.export import card, torch_check, usage
from easyaira.export.hf_config import generation_config, released, with_dtype
from easyaira.export.records import Records
from easyaira.storage.pretrained import Pretrained
from easyaira.train import energy
from easyaira.train.setup import prepare
from helpers import tiny

NASTY = "a|b\n---\nlicense: mit\n```\n# <script>x</script> [l](u) \"q\" 'p' {y: z} & \\ é \x07"


def of(folder):
    """A card's front matter and its text."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    loaded = ModelCard(text)
    assert metadata_load(folder / "README.md") == yaml.safe_load(text.split("---\n")[1])
    return loaded.data.to_dict(), loaded.text


def table_rows(text, heading):
    """First cell -> the others, of the table under a heading."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len({len(row) for row in cells}) == 1, lines
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells[2:]}


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    """An SFT run whose every name and text is nasty, and a DPO run from it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
    root = tmp_path_factory.mktemp("runs")
    nasty = NASTY.replace("/", "_")
    folder = root / nasty
    folder.mkdir()
    tiny.save(folder / "model", tiny.CONFIGS["gpt2"])
    (folder / "model").rename(folder / nasty)
    rows = tiny.write_rows(folder / f"{nasty}.jsonl", tiny.sft_rows(40))
    settings = {
        "model": {"name_or_path": str(folder / nasty)},
        "data": {"train": str(rows), "eval": 0.1, "template": "aira"},
        "generation": {"temperature": 0.3, "top_k": 30, "max_new_tokens": 8},
        "card": {
            "license": "other", "license_name": NASTY, "base_license": NASTY,
            "data_licenses": {rows.name: NASTY}, "language": ["pt"], "widget": [NASTY],
            "inference": {"temperature": 0.2},
        },
        "max_steps": 3, "num_samples": 0, "output_dir": str(root / "a|b `c`"),
    }  # fmt: skip
    (root / "sft.yaml").write_text(yaml.safe_dump(settings))
    cli.run_command(train_sft.main, [f"--config={root / 'sft.yaml'}"])
    patch.setattr(torch_check, "compare_logits", uncompared)
    cli.run_command(
        train_dpo.main,
        [
            f"--model.name_or_path={root / 'a|b `c`'}", f"--data.train={data / 'dpo.jsonl'}",
            "--data.template=aira", "--max_steps=2", "--num_samples=0", "--dpo.beta=0.25",
            "--card.title=Our model",
            f"--output_dir={root / 'dpo'}",
        ],
    )  # fmt: skip
    patch.undo()
    return root / "a|b `c`", root / "dpo"


def uncompared(*_):
    """In the place of PyTorch, where another test has it."""
    return {"compared": False, "why": "torch is not installed"}


@pytest.mark.slow
def test_no_name_or_text_breaks_the_card(runs):
    front, text = of(runs[0] / "hf")
    assert front["license"] == "other" and front["license_name"] == NASTY
    assert front["widget"] == [{"text": NASTY}] and front["language"] == ["pt"]
    assert front["inference"] == {"parameters": {"temperature": 0.2}}
    assert "base_model" not in front and "datasets" not in front  # local folders
    assert front["tags"] == ["easyaira", "sft"] and front["metrics"] == ["perplexity", "accuracy"]
    assert text.count("```") == 2 and "<script" not in text and "---\nlicense" not in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 8 and "](u)" not in text.replace("\\](u)", "")
    for heading in ("Details", "Evaluation", "Licences"):
        assert table_rows(text, heading)
    assert str(runs[0].parent) not in text


@pytest.mark.slow
def test_the_card_has_the_runs_facts(runs):
    assert "\n# Our model\n" in (runs[1] / "hf/README.md").read_text()
    _, text = of(runs[0] / "hf")
    details = {name: cells[0] for name, cells in table_rows(text, "Details").items()}
    assert details["Size"] == "12,480 parameters"  # 12,416 and 4 tokens of width 16
    assert details["Rows"] == "36 examples trained on, of 40 rows read; 4 held out"
    assert details["Updates"] == "3" and details["Seed"] == "42"
    assert details["Energy"] == "not tracked"
    assert details["Learning rate"] == "5e-05, cosine, after 0 warm-up updates"
    assert "betas 0.9 and 0.999, epsilon 1e-08" in details["Optimizer"]
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    before, after = (f"{row['eval_loss']:.4g}" for row in (rows[0], rows[-1]))
    assert before != after and table_rows(text, "Evaluation")["loss"] == [before, after]
    assert "Training saw 60 % of the data" in text  # 24 of 40, in 5 updates an epoch
    proof = json.loads((runs[0] / "hf/export_report.json").read_text())
    assert proof["read_back"] in text and f"{proof['logits']['max_difference']:.2g}" in text


@pytest.mark.slow
def test_what_nobody_said_is_unknown(runs):
    front, text = of(runs[1] / "hf")
    assert front["license"] == "unknown" and "language" not in front
    assert set(sum(table_rows(text, "Licences").values(), [])) == {"not stated"}
    assert "No rows were held out" in text and "metrics" not in front
    assert "arXiv:2305.18290" in text and "not compared: torch is not installed." in text
    assert "beta 0.25" in table_rows(text, "Details")["Objective"][0]


def test_the_objective_lists_the_options_of_its_algorithm():
    shown = card._applying("rl", asdict(RLConfig(reward="a.py:f", algorithm="grpo")))
    assert {"beta", "epsilon", "loss_type", "reward"} <= shown.keys()
    assert not {"gamma", "lam", "vf_coef", "normalize_advantages"} & shown.keys()
    shown = card._applying("dpo", asdict(DPOConfig(["sigmoid", "dpop"])))
    assert {"beta", "label_smoothing", "dpop_lambda"} <= shown.keys()
    assert not {"simpo_gamma", "kto_group", "f_alpha_divergence_coef"} & shown.keys()
    shown = card._applying("dpo", asdict(DPOConfig("kto", kto_group=4)))
    assert {"beta", "kto_group", "undesirable_weight"} <= shown.keys()
    assert not {"label_smoothing", "reference", "dpop_lambda"} & shown.keys()
    assert card._applying("sft", {"gamma": 1}) == {"gamma": 1}


@pytest.mark.slow
def test_the_usage_runs(runs, capsys):
    _, text = of(runs[0] / "hf")
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace('"path/to/this/folder"', repr(str(runs[0] / "hf")))
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip()


def proof(names=("w",)):
    logits = {"compared": True, "max_difference": 1e-6, "largest_logit": 3.0}
    tensors = {name: {"shape": [8, 16]} for name in names}
    return {"tensors": tensors, "read_back": "all is well", "logits": logits}


def rewritten(run, tmp_path, **changes):
    """The card of a copy of a run whose config.yaml is changed: group -> its options."""
    for name in ("metrics.jsonl", "data_report.json"):
        (tmp_path / name).write_text((run / name).read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    for group, options in changes.items():
        config[group] = config[group] | options if isinstance(config.get(group), dict) else options
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    tensors = ("base.lora_A.weight", "base.lora_B.weight") if changes.get("lora") else ("w",)
    (tmp_path / "README.md").write_text(card.text(Records(tmp_path, 3), proof(tensors)))
    return of(tmp_path)


@pytest.mark.slow
def test_hub_models_and_data_are_linked_and_energy_is_in_grams(runs, tmp_path):
    row = {"duration": 60, "energy_consumed": 0.25, "emissions": 0.1, "country_name": "Brazil"}
    energy._write(tmp_path, [row | {"source": "GPU measured (by its driver)"}] * 2 + [{}])
    front, text = rewritten(
        runs[0],
        tmp_path,
        model={"name_or_path": "openai-community/gpt2"},
        data={"train": [{"path": "owner/data", "split": "english"}]},
        provenance={"model_commit": "abc", "base_model": "openai-community/gpt2"},
        card={"data_licenses": {"owner/data": "apache-2.0"}, "base_license": "mit"},
    )
    assert front["base_model"] == "openai-community/gpt2" and front["datasets"] == ["owner/data"]
    emissions = front["co2_eq_emissions"]
    assert emissions["emissions"] == 200 and emissions["geographical_location"] == "Brazil"
    assert emissions["source"] == "CodeCarbon: GPU measured (by its driver)"
    assert emissions["training_type"] == "fine-tuning" and emissions["hardware_used"] == "1 x cpu"
    details = table_rows(text, "Details")
    assert (
        "0.5 kWh and 0.2 kg" in details["Energy"][0] and "1 sessions were" in details["Energy"][0]
    )
    licences = table_rows(text, "Licences")
    assert licences["owner/data"] == ["apache-2.0"]
    assert licences["openai-community/gpt2 at commit abc"] == ["mit"]


@pytest.mark.slow
def test_adapters_and_reward_models_have_their_own_usage(runs, tmp_path):
    adapters = {"r": 8, "target_modules": ["a", "b"], "quantize": "nf4"}
    front, text = rewritten(runs[0], tmp_path, lora=adapters, data={"reverse": True})
    assert '"A capital do Brasil é Brasília."' in text and "held in nf4" in text
    assert front["library_name"] == "peft" and "AutoPeftModelForCausalLM" in text
    assert table_rows(text, "Details")["Adapter"] == [
        "LoRA: r 8, target\\_modules a b, quantize nf4; 256 trained parameters"
    ]
    assert "arXiv:2106.09685" in text and "arXiv:2308.06259" in text and "lora" in front["tags"]
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    del config["sft"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"reward": {"x": 5, "y": None}}))
    (tmp_path / "README.md").write_text(card.text(Records(tmp_path, 3), proof()))
    front, text = of(tmp_path)
    assert front["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification" in text and ": x 5" in text
    assert "apply_chat_template(messages" in text and "{inputs}" not in text


@pytest.mark.parametrize("languages", [["pt"], ["pt-BR", "en"], ["en", "pt"], []])
def test_examples_are_in_the_first_language_if_that_is_portuguese(languages):
    english, shown = usage.PORTUGUESE.keys(), set()
    for kind in usage.KINDS:
        for judged in usage.JUDGED:
            for reverse in (False, True):
                *_, code = usage.usage(kind, judged, reverse, languages)
                compile(code.split("```python\n")[1].split("```")[0], "card", "exec")
                shown |= {text for text in english if text in code}
                assert any(text in code for pair in usage.PORTUGUESE.items() for text in pair)
    assert shown == (set() if languages and languages[0].startswith("pt") else english)


def copied(run, tmp_path):
    for name in ("metrics.jsonl", "data_report.json", "config.yaml"):
        shutil.copy(run / name, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_card_of_an_earlier_checkpoint_quotes_no_later_metrics(runs, tmp_path):
    folder = copied(runs[0], tmp_path)
    text = card.text(Records(folder, 1), proof())
    assert table_rows(text, "Details")["Updates"] == ["1"]
    assert "| metric | before training | at update 0 |" in text


def test_the_card_quotes_complete_evaluations_of_these_weights(runs, tmp_path, capsys):
    folder = copied(runs[1], tmp_path)
    figures = {"examples": 1000, "data": "allenai/ai2_arc", "dtype": "float32", "step": 2}
    arc = {"metric": "acc_norm", "metrics": {"acc_norm": 0.24661}, "better": "higher"}
    lower = {"metric": "perplexity", "metrics": {"perplexity": 31.5}, "better": "lower"}
    for changed in (
        arc | {"task": "arc|x", "num_fewshot": 25},
        lower | {"task": "wikitext"},
        arc | {"task": "b", "metric": "acc", "metrics": {"acc": 0.5}},
        arc | {"task": "of_another_step", "step": 1},
        arc | {"task": "of_some_questions", "limit": 10},
    ):
        results.write(folder / "evaluation", results.Result(**figures | changed))
    text = card.text(Records(folder, 2), proof())
    assert "shares are in percent, 37.33 on average:" in text
    evaluated = table_rows("## E\n" + text.split("evaluated afterwards")[1], "E")
    assert evaluated == {
        r"arc\|x, 25-shot": [r"acc\_norm", "24.66", "1,000"],
        "b": ["acc", "50.00", "1,000"],
        "wikitext": ["perplexity", "31.5", "1,000"],
    }
    (index,) = card.stated(text)["front"]["model-index"]  # as `verify` compares it
    assert index["name"] == "Our model"  # card.title
    assert [one["metrics"] for one in index["results"]] == [
        [{"type": "acc_norm", "value": 24.661}],
        [{"type": "acc", "value": 50.0}],
        [{"type": "perplexity", "value": 31.5}],
    ]
    assert index["results"][0]["task"] == {"type": "text-generation"}
    label = "arc|x, 25-shot"
    named = {"name": label, "type": "allenai/ai2_arc", "config": label}
    assert index["results"][0]["dataset"] == named
    (folder / "evaluation/b.json").write_text("{")
    assert "model-index" not in card.text(Records(folder, 2), proof())
    assert "results of evaluations are left out" in capsys.readouterr().out


@pytest.mark.slow
def test_a_card_never_quotes_half_the_metrics(runs, tmp_path):
    folder = copied(runs[0], tmp_path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"logging_steps": 1}))
    whole = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(whole[0])
    text = card.text(Records(folder, 3), proof())
    assert table_rows(text, "Details")["Updates"] == ["3"] and "Epochs" not in text
    assert "metrics.jsonl ends at update 0 of 3" in text and "| metric |" not in text


@pytest.mark.slow
def test_a_card_without_a_data_report_leaves_its_facts_out(runs, tmp_path, capsys):
    folder = copied(runs[0], tmp_path)
    (folder / "data_report.json").write_text('{"train": ')
    text = card.text(Records(folder, 3), proof())
    assert "| Rows |" not in text and "## Usage" in text
    assert "data_report.json: cannot be read: not JSON" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "- 1", "seed: 42\n", "a: [", b"\xff"])
def test_a_damaged_configuration_is_refused_before_weights_are_read(
    content, runs, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    written = content if isinstance(content, bytes) else content.encode()
    (run / "config.yaml").write_bytes(written)
    monkeypatch.setattr(Pretrained, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as end:
        cli.run_command(convert.main, ["to_hf", str(run), str(tmp_path / "out")])
    assert end.value.code == 2 and "config.yaml: " in capsys.readouterr().err


def test_a_conversions_card_is_one_document(models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_check, "compare_logits", uncompared)
    cli.run_command(convert.main, ["from_hf", str(models / "gpt2"), str(tmp_path / "a|b")])
    cli.run_command(convert.main, ["to_hf", str(tmp_path / "a|b"), str(tmp_path / "hf")])
    front, text = of(tmp_path / "hf")
    assert front["tags"] == ["easyaira"] and "a\\|b" in text and str(tmp_path) not in text


def token_ids(folder):
    """The ids of control tokens in each of a folder's files, as transformers reads them."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    names = [f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "unk")]
    loaded = [
        kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoConfig, GenerationConfig)
    ]
    return [[getattr(source, name, None) for name in names] for source in loaded]


@pytest.mark.slow
def test_control_tokens_are_the_same_in_all_files(runs):
    for folder in runs:  # the second one starts from a tokenizer that has them
        tokenizer, config, generation = token_ids(folder / "hf")
        assert tokenizer == config == generation == [300, 301, 303, 302, 0]
    settings = json.loads((runs[0] / "hf/generation_config.json").read_text())
    assert settings["do_sample"] is True and "_from_model_config" not in settings
    assert (settings["temperature"], settings["top_k"], settings["max_new_tokens"]) == (0.3, 30, 8)
    assert json.loads((runs[1] / "hf/generation_config.json").read_text())["temperature"] == 0.3


@pytest.mark.slow
def test_a_file_with_other_ids_is_put_right(runs, data, tmp_path):
    """config.json of the published Aira models still has GPT-2's ids."""
    shutil.copytree(runs[0] / "hf", tmp_path / "aira")
    file = tmp_path / "aira/config.json"
    wrong = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    arguments = [
        f"--model.name_or_path={tmp_path / 'aira'}", f"--data.train={data / 'sft.jsonl'}",
        "--data.template=aira", "--generation.do_sample=false",
    ]  # fmt: skip
    config, _ = cli.parse(TrainSFT, arguments)
    facts = released(prepare(config, sft_algorithm(config)))
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id")
    for settings in (facts.config, facts.generation_config):
        assert [settings[name] for name in names] == [300, 301, 303, 302, 0]
    # the file said to draw with a temperature
    assert facts.generation_config["do_sample"] is False
    assert "temperature" not in facts.generation_config


@pytest.mark.parametrize("stated", [None, ["GPT2Model"]])
def test_a_release_names_the_class_of_a_language_model(stated, models, data, tmp_path):
    """Other programs choose by it, and not by model_type."""
    model = shutil.copytree(models / "gpt2", tmp_path / "gpt2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": stated}))
    arguments = [
        f"--model.name_or_path={model}", f"--data.train={data / 'sft.jsonl'}",
        "--data.template=plain", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    config, _ = cli.parse(TrainSFT, arguments)
    facts = released(prepare(config, sft_algorithm(config)))
    assert facts.config["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("kind", ["olmo2", "smollm3"])
def test_ids_that_nobody_states_are_none_and_not_the_defaults_of_transformers(kind, data, tmp_path):
    """SmolLM3's default pad token is 128004, with which a smaller model cannot be built."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {k: v for k, v in tiny.FAMILIES[kind].items() if not k.endswith("_token_id")}
    tiny.ground(tmp_path, bare={"model": config})
    arguments = [
        f"--model.name_or_path={tmp_path / 'model'}", f"--data.train={data / 'sft.jsonl'}",
        "--model.init=random", "--data.template=plain", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    run, _ = cli.parse(TrainSFT, arguments)
    facts = released(prepare(run, sft_algorithm(run)))
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts.config))
    assert built.config.pad_token_id is None and built.config.eos_token_id == 0


def test_settings_that_transformers_refuses_are_refused_before_the_run(
    models, data, tmp_path, capsys
):
    with pytest.raises(ConfigError, match="generation_config.json: transformers refuses it"):
        generation_config({"num_beams": 2, "num_return_sequences": 3})
    for option, message in (
        ("--generation.do_sample=false", "false would ignore temperature"),
        ("--generation.top_p=1.5", "generation.top_p: expected"),
        ("--generation.temprature=1", "did you mean generation.temperature?"),
    ):
        arguments = [
            f"--model.name_or_path={models / 'gpt2'}", f"--data.train={data / 'sft.jsonl'}",
            "--generation.temperature=0.5", option, f"--output_dir={tmp_path / 'run'}",
        ]  # fmt: skip
        with pytest.raises(SystemExit) as end:
            cli.run_command(train_sft.main, arguments)
        err = capsys.readouterr().err
        assert end.value.code == 2 and message in err, err
        assert not (tmp_path / "run").exists()


def facts_of(models, data, tmp_path, config=None, generation=None, *options):
    """What a run on this model would release, with other entries in its two files."""
    model = shutil.copytree(models / "gpt2", tmp_path / "gpt2")
    for name, changes in (("config.json", config), ("generation_config.json", generation)):
        file = model / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | (changes or {})))
    arguments = [
        f"--model.name_or_path={model}", f"--data.train={data / 'sft.jsonl'}",
        "--data.template=plain", f"--output_dir={tmp_path / 'run'}", *options,
    ]  # fmt: skip
    run, _ = cli.parse(TrainSFT, arguments)
    return released(prepare(run, sft_algorithm(run)))


@pytest.mark.parametrize(
    "config, generation, message",
    [
        ({"pad_token_id": 300}, {}, "config.json: pad_token_id: found 300, expected ids below 300"),
        ({"sep_token_id": -2}, {}, "config.json: sep_token_id: found -2"),
        ({}, {"eos_token_id": [2, 300]}, "generation_config.json: eos_token_id: found 300"),
        ({}, {"eos_token_id": True}, "generation_config.json: eos_token_id: found True"),
        ({}, {"pad_token_id": 300}, "generation_config.json: pad_token_id: found 300"),
        ({}, {"temperature": "hot"}, "temperature: found 'hot', expected a number from 0;"),
        ({}, {"top_p": 1.5}, "top_p: found 1.5, expected a number from 0 to 1;"),
    ],
)
def test_ids_beyond_the_vocabulary_and_wild_settings_are_refused_before_the_run(
    config, generation, message, models, data, tmp_path
):
    with pytest.raises(ConfigError) as error:
        facts_of(models, data, tmp_path, config, generation)
    assert message in str(error.value) and "correct or remove it" in str(error.value)


def test_examples_of_the_card_in_another_models_form_are_refused_before_the_run(
    models, data, tmp_path
):
    options = ["--card.widget=['<|user|>hi']"]
    with pytest.raises(ConfigError, match=r"card.widget: <\|user\|> is not a token of this run"):
        facts_of(models, data, tmp_path / "plain", None, None, *options)
    assert facts_of(models, data, tmp_path / "tulu", None, None, *options, "--data.template=tulu")


def test_end_tokens_that_files_disagree_on_all_end_an_answer(models, data, tmp_path):
    facts = facts_of(
        models, data, tmp_path, {"eos_token_id": 9, "pad_token_id": -1},
        {"eos_token_id": [7, 0], "pad_token_id": -1},
    )  # fmt: skip
    assert facts.config["eos_token_id"] == facts.generation_config["eos_token_id"] == [0, 7]
    assert facts.config["pad_token_id"] is None  # -1 is no token
    assert facts.generation_config["pad_token_id"] is None


def test_both_names_of_the_data_type_say_what_is_stored(models, data, tmp_path):
    config = {"dtype": "bfloat16", "torch_dtype": "float16"}  # the weights are in float32
    facts = facts_of(models, data, tmp_path, config)
    assert facts.config["dtype"] == facts.config["torch_dtype"] == "float32"
    assert with_dtype(facts.config, "float16")["torch_dtype"] == "float16"
