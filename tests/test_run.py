"""The commands from start to end, as a user runs them: folders, messages, exit statuses."""

import json
import os
import re
import shutil
import signal
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
import yaml
from safetensors import SafetensorError

from easyaira import cli, convert, generate, train_dpo, train_sft
from easyaira.config.run import TrainSFT, to_dict
from easyaira.errors import ConfigError, Preempted, StorageError
from easyaira.generation import sampler
from easyaira.generation.processors import Sampling
from easyaira.hf import safetensors
from easyaira.run import folder as run_folder
from easyaira.run.provenance import completed
from easyaira.storage import checkpoints
from easyaira.storage.tokenizers import save_tokenizer
from easyaira.train import log as logs
from easyaira.train import step as steps
from easyaira.train import trackers
from helpers import runs, tiny
from helpers.adapters import TARGETS, peft_model
from helpers.processes import call
from helpers.runs import argv


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Models and data to run on."""
    gpt2 = {"gpt2": tiny.CONFIGS["gpt2"]}
    rows = {"sft": tiny.sft_rows(40), "dpo": tiny.dpo_rows(40)}
    return tiny.ground(tmp_path_factory.mktemp("ground"), gpt2, {"bare": gpt2["gpt2"]}, **rows)


FEW = {"data.eval": 0.1, "max_steps": 4, "logging_steps": 2, "num_samples": 2, "export": True}


def command(ground, task, out, *flags, model="gpt2"):
    """A command line: four updates, evaluated, sampled from and exported."""
    return argv(task, ground / model, ground, out, *flags, **FEW)


@pytest.mark.slow
def test_from_a_bare_config_to_two_released_models(ground, tmp_path, capsys, devices):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    extra = ["--data.template=aira", "--model.init=random", "--optimizer.weight_decay=0.1"]
    status, out, _ = call(train_sft.main, command(ground, "sft", sft, *extra, model="bare"), capsys)
    assert status == 0 and "bit for bit" in out
    silent = ("answering 2 prompts", "evaluating held-out examples", "compiling the first update")
    stages = [f"run     {what}" for what in silent]  # each once, before nothing is printed for long
    assert [line for line in out.splitlines() if line in stages] == stages
    held = {path.name for path in sft.iterdir()}
    assert held == {
        ".lock",
        "config.yaml", "metrics.jsonl", "tensorboard", "data_report.json", "data_report.html",
        "checkpoints", "report.html", "samples.json", "tokenizer", "hf",
    }  # fmt: skip

    config = yaml.safe_load((sft / "config.yaml").read_text())
    assert config["optimizer"]["weight_decay"] == 0.1
    made = config["provenance"]
    assert made["versions"]["jax"] and made["data_fingerprint"] and made["devices"]["count"] == 1
    rows = logs.read(sft / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    trained = {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "tokens_per_second",
               "step_time", "mfu", "mean_token_accuracy", "padding", "data_wait",
               "positions", "cpu_time", "compilations"}  # fmt: skip
    assert trained <= rows[1].keys() and "eval_loss" in rows[0] and "eval_loss" in rows[2]
    board = EventAccumulator(str(sft / "tensorboard")).Reload()
    written = {event.step: event.value for event in board.Scalars("train/loss")}
    assert written.keys() == {2, 4}
    for row in rows[1:]:
        np.testing.assert_allclose(written[row["step"]], row["loss"], rtol=1e-6)
    page = (sft / "report.html").read_text()
    assert "<svg" in page and "learning_rate" in page
    assert "<svg" in (sft / "data_report.html").read_text()
    for text in (page, (sft / "data_report.html").read_text()):
        assert not re.search(r"//|url\(|@import|src=", text)  # nothing is fetched from elsewhere
        links = re.findall(r'href="([^"]*)"', text)
        assert links and all((sft / link).exists() for link in links)
    report = json.loads((sft / "data_report.json").read_text())
    assert report["train"]["read"] == 40 == report["train"]["kept"]
    sampled = json.loads((sft / "samples.json").read_text())
    assert [list(row["answers"]) for row in sampled] == [["0", "4"]] * 2
    assert page.count("wanted: ") == page.count(">before:<") == page.count(">update 4:<") == 2
    assert "http-equiv" not in page  # it is finished

    hf = {path.name for path in (sft / "hf").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md",
            "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "export_report.json", "proof.json"} == hf  # fmt: skip
    proof = json.loads((sft / "hf/export_report.json").read_text())
    assert proof["logits"]["compared"] and len(proof["tensors"]) == 28
    config, generation = (
        json.loads((sft / "hf" / f"{name}.json").read_text())
        for name in ("config", "generation_config")
    )
    assert config["vocab_size"] == 304 and config["torch_dtype"] == "float32"
    for key, token in (("bos_token_id", 300), ("eos_token_id", 301), ("pad_token_id", 303)):
        assert config[key] == generation[key] == token
    card = (sft / "hf/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front and "| perplexity |" in card  # a folder is no hub id

    status, out, _ = call(
        train_dpo.main,
        command(ground, "dpo", dpo, f"--model.name_or_path={sft}", "--data.template=chat"),
        capsys,
    )
    assert status == 0, out
    rows = logs.read(dpo / "metrics.jsonl")
    paired = {f"{a}/{b}" for a in ("rewards", "logps", "logits") for b in ("chosen", "rejected")}
    paired |= {"rewards/margins", "rewards/accuracies"}
    assert paired <= rows[1].keys()
    assert {"eval_" + name for name in paired} <= rows[2].keys()
    assert json.loads((dpo / "hf/config.json").read_text())["eos_token_id"] == 301

    repeated = command(ground, "sft", sft, *extra, "--mesh=dp=2", "--logging_steps=3", model="bare")
    devices(2)
    record = (sft / "config.yaml").read_bytes()
    status, out, _ = call(train_sft.main, repeated, capsys)
    assert status == 0 and "finished after 4 updates; nothing to do" in out
    assert (sft / "config.yaml").read_bytes() == record
    shutil.rmtree(sft / "hf")
    assert call(train_sft.main, repeated, capsys)[0] == 0  # only the release is made again
    now, then = (yaml.safe_load(text) for text in ((sft / "config.yaml").read_bytes(), record))
    assert now["provenance"] == then["provenance"] and now["mesh"] == "dp=2"
    assert (sft / "hf/README.md").read_text() == card


@pytest.mark.slow
def test_a_dry_run_says_what_would_happen_and_writes_nothing(ground, tmp_path, capsys, devices):
    """On several devices, also how each parameter is sharded."""
    for main, task, count in ((train_sft.main, "sft", 1), (train_dpo.main, "dpo", 2)):
        devices(count)
        arguments = command(
            ground, task, tmp_path / "run", "--dry_run", "--optimizer.warmup_ratio=0.5"
        )
        status, out, err = call(main, arguments, capsys)
        assert status == 0, err
        assert "12,416 parameters" in out and "4 updates of 8 examples, 2 of them warm-up" in out
        assert "36 examples, 4 held out of 40 rows" in out
        sharded = "" if count == 1 else " +-, fsdp, tp"
        assert re.search(rf"model/h/mlp/c_fc/kernel +\(2, 16, 64\){sharded}$", out, re.M)
        assert re.search(r"memory per device: \d+ MiB held .* \d+ MiB in a step", out)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--optimizer.learning_rat=1"], "did you mean optimizer.learning_rate[?]"),
        (["--mesh=dp=3"], "asks for 3 devices, but there are 1"),
        (["--data.train=nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--data.columns={prompt: x}"], "no column 'x'"),
        (["--data.max_length=65"], "data.max_length: 65 is more than the model's 64 positions"),
        (["--model.name_or_path=./nothing"], "./nothing: no such folder"),
        (["--model.revision=main"], "model.revision: .* is a local folder"),
        (["--data.split=english"], "has no splits; leave out split 'english'"),
        (["--data.split=x", "--data.train=[{path: x}]"], "data.split and data.columns: apply to"),
        (["--model.name_or_path={ground}/bare"], "no model.safetensors; to start from config.json"),
        (["--model.tokenizer={ground}/large"], "has 310 tokens, but the embedding has 300"),
        (["--data.template=nothing"], "data.template: no template 'nothing'"),
        (["--data.template=chat"], "the tokenizer has no chat template"),
        (["--optimizer.warmup_steps=4"], "optimizer.warmup_steps: 4 of 4 updates"),
        (["--resume=must"], "resume: there is no run"),
        (["--output_dir={ground}", "--data.train=nothing.jsonl"], "is not empty and holds no run"),
        (["--output_dir={ground}/a[1]", "--data.train=nothing.jsonl"], "need a path without .;"),
        (["--output_dir={ground}/a\\b", "--data.train=nothing.jsonl"], "need a path without .;"),
        (["--data.eval=0.999"], "data.eval: 0.999 of 40 prompts leaves one part empty"),
        (["--train_batch_size=64", "--data.drop_last=true"], "more than the 36 examples"),
    ],
)
def test_bad_input_ends_with_2_and_one_line_before_anything_is_written(
    extra, message, ground, tmp_path, capsys
):
    tiny.save_config(ground / "large", tiny.CONFIGS["gpt2"] | {"vocab_size": 320})
    extra = [argument.replace("{ground}", str(ground)) for argument in extra]
    status, out, err = call(
        train_sft.main, command(ground, "sft", tmp_path / "run", *extra), capsys
    )
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), err
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_debug_shows_where_an_error_comes_from(ground, tmp_path):
    from easyaira.errors import ConfigError

    with pytest.raises(ConfigError):
        cli.run_command(train_sft.main, command(ground, "sft", tmp_path, "--mesh=dp=3", "--debug"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra, message",
    [
        (["--optimizer.learning_rate=1e-3"], "optimizer.learning_rate: the run in .* with 5e-05"),
        (["--seed=1"], "seed: the run in .* was started with 42, this command says 1"),
        (["--data.columns={prompt: completion}"], "data.columns"),
        (["--model.name_or_path={ground}/other"], "model.name_or_path"),
    ],
)
def test_another_runs_folder_is_refused(extra, message, ground, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(train_sft.main, command(ground, "sft", out, "--export=false"), capsys)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    tiny.save(ground / "other", tiny.CONFIGS["gpt2"])
    extra = [argument.replace("{ground}", str(ground)) for argument in extra]
    status, _, err = call(train_sft.main, command(ground, "sft", out, *extra), capsys)
    assert status == 2 and re.search(message, err), err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.slow
def test_a_run_from_before_an_option_goes_on_with_its_default(ground, tmp_path, capsys):
    out, lora = tmp_path / "run", ["--lora.r=2", "--lora.target_modules=[c_attn]"]
    data = f"--data.train=[{{path: {ground / 'sft.jsonl'}}}]"
    arguments = command(ground, "sft", out, "--export=false", data, *lora)
    assert call(train_sft.main, arguments, capsys)[0] == 0
    record = yaml.safe_load((out / "config.yaml").read_text())
    for name in ("early_stopping_patience", "sft"):  # an option, and a group
        del record[name]
    for group, name in (("optimizer", "state_dtype"), ("data", "share_prompt"), ("lora", "dora")):
        del record[group][name]
    del record["data"]["train"][0]["weight"]
    (out / "config.yaml").write_text(yaml.safe_dump(record))
    written = (out / "config.yaml").read_text()
    for option, message in (  # today's defaults are how it was made
        ("--optimizer.state_dtype=8bit", 'optimizer.state_dtype: the run in .* "float32"'),
        ("--sft.loss_type=dft", 'sft.loss_type: the run in .* "nll"'),
        ("--lora.dora=true", "lora.dora: the run in .* false"),
        (data.replace("}", ", weight: 0.5}"), "data.train: the run in .* was started with"),
        ("--lora.r=4", "lora.r: the run in .* 2"),
        ("--lora=null", "lora: the run in .* trains adapters, and this command all weights"),
    ):
        status, _, err = call(train_sft.main, [*arguments, option], capsys)
        assert status == 2 and re.search(message, err), (option, err)
    (out / "config.yaml").write_text(written)
    status, text, _ = call(train_sft.main, arguments, capsys)
    assert status == 0 and "finished after 4 updates" in text


LIBRARIES = {  # calls whose every error is taken for a fault of what they read or write
    "restoring": (checkpoints.ocp.CheckpointManager, "restore"),
    "tokenizer": (transformers.AutoTokenizer, "from_pretrained"),
    "tracker": (trackers.TensorBoard, "__init__"),
    "listing": (checkpoints.Checkpoints, "_clean"),
}


@pytest.mark.slow
def test_a_signal_inside_a_library_is_no_fault_of_what_it_reads(
    ground, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    few = ["--export=false", "--num_samples=0", "--report_to=[tensorboard]"]
    arguments = command(ground, "sft", out, *few)
    assert call(train_sft.main, arguments, capsys)[0] == 0
    folders = sorted((out / "checkpoints").iterdir())

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    for moment, (owner, name) in LIBRARIES.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            status, text, err = call(train_sft.main, [*arguments, "--max_steps=6"], capsys)
        assert status == 75, (moment, err)
        assert err.splitlines()[-1].startswith("stopped: SIGINT; nothing is lost"), moment
        assert "cannot" not in text + err, moment
        assert sorted((out / "checkpoints").iterdir()) == folders, moment
    status, text, _ = call(train_sft.main, [*arguments, "--max_steps=6"], capsys)
    assert status == 0 and "after update 4" in text


RL = {
    "rl.reward": "easyaira.rewards.rules:concise",
    "rl.max_completion_length": 4,
    "rl.num_generations": 2,
}
ONE_OF_IT = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
ON_THE_WAY = {"dpo.precompute_ref_log_probs": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, options, refused",
    [
        ("sft", {}, False),
        ("dpo", {}, False),
        ("dpo", {"data.cache_dir": "gone"}, True),
        ("dpo", ON_THE_WAY, True),
        ("rl", RL, True),
        ("dpo", ON_THE_WAY | {"lora.adapter": "before"}, True),
    ],
    ids="none before again in_step on_policy adapter".split(),
)
def test_another_reference_in_the_same_folder_is_refused(
    task, options, refused, tmp_path, monkeypatch
):
    """Other runs go on, and say what they began with."""
    model, out = tmp_path / "model", tmp_path / "run"
    tiny.save(model, tiny.CONFIGS["llama"])
    rows = tiny.dpo_rows(40) if task == "dpo" else tiny.sft_rows(40)
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    if "data.cache_dir" in options:
        options = {"data.cache_dir": tmp_path / "gone"}
    common = task, model, data, out
    adapter = tmp_path / "adapter"
    if "lora.adapter" in options:
        theirs = peft_model(model, "llama")
        theirs.save_pretrained(adapter)
        lora = {"lora.target_modules": json.dumps(TARGETS["llama"]), "lora.r": 4, "lora.alpha": 8}
        options = options | lora | {"lora.adapter": adapter}
    options = {"max_steps": 4, "optimizer.warmup_steps": 0, **options}
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        runs.stop_after(patch, 2)
        runs.train(*common, **options)
    began = yaml.safe_load((out / "config.yaml").read_text())["provenance"]["initial_weights"]
    if "lora.adapter" in options:
        theirs.get_parameter(ONE_OF_IT).data *= 2
        theirs.save_pretrained(adapter)
    else:
        tiny.save(model, tiny.CONFIGS["llama"], std=0.1)
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    if refused:
        with pytest.raises(ConfigError, match="(_path|adapter): .* has other weights than when"):
            runs.train(*common, **options)
    else:
        runs.train(*common, **options)
    made = yaml.safe_load((out / "config.yaml").read_text())["provenance"]
    assert made["initial_weights"] == began


def test_a_group_that_a_run_did_not_have_is_none_of_its_options():
    """Defaults stand for options that did not exist, and not for a group that was left out."""
    model = {"name_or_path": "m"}
    data = {"train": "d"}
    with_lora = cli.configuration(
        TrainSFT, {"model": model, "data": data, "lora": {"target_modules": ["a"]}}
    )
    without = cli.configuration(TrainSFT, {"model": model, "data": data})
    assert completed({}, with_lora)["lora"] is None
    assert completed({"lora": None}, with_lora)["lora"] is None
    assert completed({"lora": {"r": 4}}, with_lora)["lora"]["alpha"] == with_lora.lora.alpha
    assert completed({"model": model, "data": data}, without) == to_dict(without)


@pytest.mark.slow
def test_changed_data_are_refused_and_changed_logging_is_not(ground, tmp_path, capsys):
    data = tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(20))
    arguments = command(ground, "sft", tmp_path / "run", f"--data.train={data}", "--export=false")
    assert call(train_sft.main, arguments, capsys)[0] == 0
    flags = ["--logging_steps=1", "--model.gradient_checkpointing=dots"]
    assert call(train_sft.main, [*arguments, *flags], capsys)[0] == 0
    tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(21))
    status, _, err = call(train_sft.main, arguments, capsys)
    assert status == 2 and "was trained on other rows" in err


@pytest.mark.slow
def test_a_run_that_was_killed_in_its_export_exports_when_called_again(ground, tmp_path, capsys):
    arguments = command(ground, "sft", tmp_path / "run")
    assert call(train_sft.main, [*arguments, "--export=false"], capsys)[0] == 0
    assert not (tmp_path / "run/hf").exists()
    status, out, _ = call(train_sft.main, arguments, capsys)
    assert status == 0 and "continues" in out and (tmp_path / "run/hf/config.json").exists()


@pytest.mark.slow
def test_a_run_without_memory_says_what_helps_and_goes_on_with_it(
    ground, tmp_path, capsys, monkeypatch
):
    flags = ["--save_steps=2", "--logging_steps=1", "--data.eval=null", "--export=false"]
    flags += ["--num_samples=0", "--train_batch_size=8"]
    straight, stuck = tmp_path / "straight", tmp_path / "stuck"
    assert call(train_sft.main, command(ground, "sft", straight, *flags), capsys)[0] == 0
    with monkeypatch.context() as patch:
        calls, jit = [], steps.jit_train_step

        def full_in_the_third_update(*given):
            step = jit(*given)

            def update(*arguments):
                calls.append(step)
                return step(*arguments) if len(calls) < 3 else jnp.zeros(2**50, jnp.uint8)

            return update

        patch.setattr(steps, "jit_train_step", full_in_the_third_update)
        status, _, err = call(train_sft.main, command(ground, "sft", stuck, *flags), capsys)
    assert status == 2
    message = "error: computing batch 3 of the training: Out of memory allocating 1125899906842624"
    assert err.splitlines()[-1].startswith(message), err
    assert "a larger gradient_accumulation_steps (is 1), model.gradient_checkpointing: full" in err
    helped = ["--gradient_accumulation_steps=4", "--model.gradient_checkpointing=full"]
    status, out, _ = call(train_sft.main, command(ground, "sft", stuck, *flags, *helped), capsys)
    assert status == 0 and "after update 2" in out
    losses = [[row["loss"] for row in logs.read(f / "metrics.jsonl")] for f in (straight, stuck)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_metrics_are_written_once_and_a_full_disk_is_an_error_of_storage(tmp_path):
    def log(step, unmeasured=False):
        with closing(logs.Log(tmp_path, step, 9, unmeasured)) as log:
            log.write(step, {"loss": 1.0})
            log.write(step, {"eval_loss": 2.0})
        return [list(row) for row in logs.read(tmp_path / "metrics.jsonl")]

    both = ["step", "loss", "eval_loss"]  # one row a step
    assert log(0) == [both] == log(0)  # nothing was saved before: all starts again
    assert log(4) == [both] * 2 == log(4) == log(4, unmeasured=True)
    full = logs.Log(tmp_path, 5, 9, False)
    full._file.close()
    full._file = open("/dev/full", "w")
    with pytest.raises(StorageError, match="metrics.jsonl: cannot be written: .*No space"):
        full.write(6, {"loss": 1.0})
    full.close()
    with pytest.raises(StorageError, match="cannot be written"):
        logs.Log(tmp_path / "nowhere", 0, 9, False)


@pytest.mark.slow
def test_two_runs_are_not_in_one_folder(ground, tmp_path, capsys):
    folder = tmp_path / "run"
    with run_folder._locked(folder):
        status, _, err = call(train_sft.main, command(ground, "sft", folder), capsys)
    assert status == 2 and f"process {os.getpid()} of " in err and "is at work in" in err
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert call(train_sft.main, command(ground, "sft", folder, "--export=false"), capsys)[0] == 0


def test_conversions_refuse_what_would_overwrite_or_is_not_there(ground, tmp_path, capsys):
    assert call(convert.main, ["from_hf", ground / "gpt2", tmp_path / "ours"], capsys)[0] == 0
    for arguments, status, message in (
        (["from_hf", ground / "gpt2", tmp_path / "ours"], 2, "is not empty"),
        (["to_hf", ground / "gpt2", tmp_path / "x"], 2, "is not a run folder"),
        (["to_hf", tmp_path / "nothing", tmp_path / "x"], 2, "no such folder"),
        (["to_hf", tmp_path / "ours", ground], 2, "is not empty"),
        (["to_hf"], 2, "needs source and out"),
    ):
        got, _, err = call(convert.main, arguments, capsys)
        assert got == status and message in err, err


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_in_the_export_is_an_error_of_storage(
    error, ground, tmp_path, capsys, monkeypatch
):
    call(convert.main, ["from_hf", ground / "gpt2", tmp_path / "ours"], capsys)

    def full(*_):
        raise error

    monkeypatch.setattr(safetensors, "save_folder", full)
    status, _, err = call(convert.main, ["to_hf", tmp_path / "ours", tmp_path / "x"], capsys)
    message = f"error: {tmp_path}/x: cannot be written: No space left on device"
    assert status == 4 and err.splitlines()[-1] == message
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_a_full_disk_under_a_tokenizer_is_an_error_of_storage(tmp_path):
    """/dev/full has no room; the library raises a plain Exception."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=f"{tmp_path}: cannot be written: No space left on dev"):
        save_tokenizer(tiny.tokenizer(), tmp_path)


@pytest.mark.slow
def test_an_export_that_does_not_verify_leaves_nothing(ground, tmp_path, capsys, monkeypatch):
    from easyaira.export import torch_check

    call(convert.main, ["from_hf", ground / "gpt2", tmp_path / "ours"], capsys)
    monkeypatch.setattr(torch_check, "TOLERANCE", 0.0)
    status, _, err = call(convert.main, ["to_hf", tmp_path / "ours", tmp_path / "x"], capsys)
    assert status == 2 and "PyTorch logits differ" in err
    monkeypatch.undo()
    monkeypatch.setattr(
        safetensors, "tensor_hash", lambda tensor: str(np.random.default_rng().random())
    )
    status, _, err = call(convert.main, ["to_hf", tmp_path / "ours", tmp_path / "x"], capsys)
    assert status == 2 and "differ from the trained tensors" in err
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


@pytest.mark.slow
def test_an_export_in_another_dtype_says_so(ground, tmp_path, capsys):
    call(convert.main, ["from_hf", ground / "gpt2", tmp_path / "ours"], capsys)
    arguments = ["to_hf", tmp_path / "ours", tmp_path / "x", "--dtype=bfloat16"]
    status, out, _ = call(convert.main, arguments, capsys)
    assert status == 0 and "equal the trained ones, rounded to bfloat16, bit for bit" in out
    assert "rounded to bfloat16" in (tmp_path / "x/README.md").read_text()
    proof = json.loads((tmp_path / "x/proof.json").read_text())
    assert proof["compared"]["tensors"].endswith("with the trained one, rounded to bfloat16")
    config = json.loads((tmp_path / "x/config.json").read_text())
    tensors = json.loads((tmp_path / "x/export_report.json").read_text())["tensors"]
    assert config["dtype"] == "bfloat16"
    assert {tensor["dtype"] for tensor in tensors.values()} == {"bfloat16"}


def test_generate_gives_the_greedy_answer_of_transformers(ground, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = [ground / "gpt2", "--prompt=what do you", "--template=plain", "--max_new_tokens=8"]
    status, out, _ = call(generate.main, arguments, capsys)
    model = AutoModelForCausalLM.from_pretrained(ground / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(ground / "gpt2")
    ids = torch.tensor([tokenizer("what do you").input_ids])
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert status == 0
    assert (
        out.strip() == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True).strip()
    )


@pytest.mark.slow
def test_samples_follow_the_seed_and_stay_within_top_p(ground):
    model, params = tiny.load(Path(ground / "gpt2"))

    def sample(seed, top_p=1.0, temperature=3.0):
        sampling = Sampling(6, temperature=temperature, top_p=top_p, end_ids=(0,))
        answers = sampler.generate(model, params, [[5, 6, 7], [8]], sampling, seed=seed)
        return [answer.tokens for answer in answers]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_p=1e-6) == sample(2, temperature=0.0)
