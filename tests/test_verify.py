"""`easyaira verify`: a release that is not what was released is found and named; others are not
accused."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from easyaira import cli, convert, verify
from easyaira.distributed import mesh as meshes
from easyaira.errors import CheckFailed, ConfigError
from easyaira.export import adapter_base, proof, torch_check
from easyaira.hf import safetensors
from easyaira.models.registry import model_of
from easyaira.storage.pretrained import find
from helpers import in_process, runs, tiny
from helpers.processes import call

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Runs with releases: full weights, an adapter, a scorer, an adapter of a scorer."""
    root = tmp_path_factory.mktemp("verify")
    tiny.ground(root, tiny.CONFIGS, sft=tiny.sft_rows(40), dpo=tiny.dpo_rows(40))
    tiny.ground(root, {"bert": tiny.SCORERS["bert"]}, reward=tiny.dpo_rows(40))
    common = {"max_steps": 3, "optimizer.warmup_steps": 1, "export": True, "data.eval": 0.1}
    lora = "--lora={r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"
    for name, task, model, flags in (
        ("sft", "sft", "gpt2", ()),
        ("adapter", "sft", "llama", (lora,)),
        ("scorer", "reward", "bert", ()),
        ("scoring adapter", "reward", "bert", (lora.replace("q_proj, v_proj", "query, value"),)),
    ):
        runs.train(task, root / model, root, root / name, *flags, **common)
    return root


def lines_of(folder, capsys, *flags):
    """Check -> line, and whether all is well."""
    capsys.readouterr()
    try:
        verify.main([str(folder), *flags])
        ok = True
    except CheckFailed:
        ok = False
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[1]: line for line in lines}, ok


def converted(ground, kind, out, *flags):
    """A model as a release, by way of `from_hf` and `to_hf`."""
    if not (ground / f"{kind} ours").exists():
        convert.main(["from_hf", str(ground / kind), str(ground / f"{kind} ours")])
    convert.main(["to_hf", str(ground / f"{kind} ours"), str(out), *flags])
    return out


def sharded(ground, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.save_folder, "__defaults__", (20_000,))
        return converted(ground, "llama", out)


def copied(folder, out):
    shutil.copytree(folder, out)
    return out


def touched_up(ground, out):
    """What people and the hub do to a folder before it is published."""
    copied(ground / "sft/hf", out)
    card = out / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: mit") + "\n## Thanks\n")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(dict(sorted(config.items()))))
    (out / "LICENSE").write_text("MIT")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    (out / ".git").mkdir()
    return out


def without_torch(ground, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_check, "obstacle", lambda *_, **__: "torch is not installed")
        return converted(ground, "gpt2", out)


def to_hf(run, out, *flags):
    convert.main(["to_hf", str(run), str(out), *flags])
    return out


HEALTHY = {
    "the release in a run folder": lambda ground, out: ground / "sft/hf",
    "an adapter in a run folder": lambda ground, out: ground / "adapter/hf",
    "a scorer in a run folder": lambda ground, out: ground / "scorer/hf",
    "a scorer's adapter in a run folder": lambda ground, out: ground / "scoring adapter/hf",
    "a release elsewhere": lambda ground, out: copied(ground / "sft/hf", out),
    "an adapter converted elsewhere": lambda ground, out: to_hf(ground / "adapter", out),
    "a merged adapter": lambda ground, out: to_hf(ground / "adapter", out, "--merge"),
    "bfloat16": lambda ground, out: to_hf(ground / "sft", out, "--dtype=bfloat16"),
    "Llama": lambda ground, out: converted(ground, "llama", out),
    "OPT in float16": lambda ground, out: converted(ground, "opt", out, "--dtype=float16"),
    "shards": sharded,
    "touched up for the hub": touched_up,
    "released without torch": without_torch,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_release_is_not_accused(name, ground, tmp_path, capsys):
    folder = HEALTHY[name](ground, tmp_path / "release")
    lines, ok = lines_of(folder, capsys)
    assert ok, lines
    assert lines.keys() >= {"proof", "tensors", "files", "logits", "card"}
    assert ("run" in lines) == (folder.parent.parent == ground)
    assert ("base" in lines) == (folder / "adapter_config.json").exists()
    skipped = [check for check, line in lines.items() if line.startswith("skipped")]
    assert skipped == (["logits"] if name == "released without torch" else [])


def changed_tensors(folder, change, file=WEIGHTS):
    """Rewrite the weights after `change` of a dictionary of arrays."""
    tensors = {name: np.array(a) for name, a in safetensors.open_file(folder / file).items()}
    save_file(change(tensors) or tensors, folder / file, metadata={"format": "pt"})


def one_bit(folder):
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def swapped(folder):
    def change(tensors):
        a, b = (f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    changed_tensors(folder, change)


def untied(folder):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    changed_tensors(folder, change)
    edited(folder, "config.json", tie_word_embeddings=False)


def edited(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))


def another_tokenizer(folder):
    tiny.tokenizer(290).save_pretrained(folder / "other")
    shutil.move(folder / "other/tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "other")


def rounded_twice(folder):
    def change(tensors):
        return {
            name: a.astype(jnp.bfloat16).astype(np.float16).astype(np.float32)
            for name, a in tensors.items()
        }

    changed_tensors(folder, change)


def another_number(folder):
    card = folder / "README.md"
    line = next(li for li in card.read_text().splitlines() if li.startswith("| perplexity"))
    card.write_text(card.read_text().replace(line, line.rsplit("|", 2)[0] + "| 12.3 |"))


def another_row(folder):
    card = folder / "README.md"
    row = "| perplexity"
    card.write_text(card.read_text().replace(row, f"| helpfulness | 1 | 99 |\n{row}", 1))


def another_line(folder, old, new):
    card = folder / "README.md"
    assert old in card.read_text()
    card.write_text(card.read_text().replace(old, new))


def of_another_run(folder, ground, *names):
    for name in names:
        shutil.copy(ground / "other/hf" / name, folder / name)


FAULTS = {  # fault: (release, what is done to it, check, what its line says)
    "one bit of a tensor": ("sft", one_bit, "tensors", "transformer.wte.weight: other values"),
    "two tensors swapped": (
        "sft", swapped, "tensors",
        "transformer.h.0.attn.c_attn.weight: holds the tensor that was released as "
        "transformer.h.1.attn.c_attn.weight",
    ),
    "the tied head untied": ("sft", untied, "tensors", "lm_head.weight: was not released"),
    "the tied head untied, in config.json": (
        "sft", untied, "files", "config.json: tie_word_embeddings is False",
    ),
    "another tokenizer.json": (
        "sft", another_tokenizer, "files", "tokenizer.json: model.merges is [[",
    ),
    "another template": (
        "sft", lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        "files", "chat_template.jinja: is another file than was released",
    ),
    "a template added": (
        "adapter", lambda folder: (folder / "chat_template.json").write_text("{}"),
        "files", "chat_template.json: was not released",
    ),
    "another eos": (
        "sft", lambda folder: edited(folder, "generation_config.json", eos_token_id=7),
        "files", "generation_config.json: eos_token_id is 7, was released as 0",
    ),
    "another eos of the tokenizer": (
        "sft", lambda folder: edited(folder, "tokenizer_config.json", eos_token="the"),
        "files", "tokenizer_config.json: eos_token is the, was released as <|endoftext|>",
    ),
    "a shard missing": (
        "shards", lambda folder: next(folder.glob("model-00002-*")).unlink(),
        "tensors", ".safetensors: cannot be read",
    ),
    "rounded twice": (
        "sft", rounded_twice, "tensors", "no tensor is as in proof.json: rounded again, or of",
    ),
    "another dtype": (
        "sft",
        lambda folder: changed_tensors(
            folder, lambda tensors: {n: a.astype(np.float16) for n, a in tensors.items()}
        ),
        "tensors", "transformer.h.0.attn.c_attn.bias: dtype is float16, was released as float32",
    ),
    "a card with another number": (
        "sft", another_number, "card", "README.md: Evaluation: released with | perplexity |",
    ),
    "a card with a row more": ("sft", another_row, "card", "| helpfulness | 1 | 99 | was added"),
    "a card with other updates": (
        "sft", lambda folder: another_line(folder, "| Updates | 3 |", "| Updates | 3000 |"),
        "card", "README.md: Details: released with | Updates | 3 |, says | Updates | 3000 |",
    ),
    "a card of another base": (
        "sft",
        lambda folder: another_line(folder, "library_name:", "base_model: a/b\nlibrary_name:"),
        "card", "README.md: base_model is a/b, was released without it",
    ),
    "no card": (
        "sft", lambda folder: (folder / "README.md").unlink(), "card", "README.md: No such file",
    ),
    "an adapter on another base": (
        "adapter",
        lambda folder: edited(
            folder, "adapter_config.json", base_model_name_or_path=str(folder.parent / "base")
        ),
        "base", "base: holds other weights than the base of this adapter",
    ),
    "an adapter on another base, in its configuration": (
        "adapter",
        lambda folder: edited(folder, "adapter_config.json", base_model_name_or_path="gone"),
        "files", "adapter_config.json: base_model_name_or_path is gone, was released as",
    ),
    "an adapter's scale": (
        "adapter", lambda folder: edited(folder, "adapter_config.json", lora_alpha=16),
        "files", "adapter_config.json: lora_alpha is 16, was released as 8",
    ),
    "another rope_theta": (
        "shards",
        lambda folder: edited(folder, "config.json", rope_parameters={"rope_theta": 500.0}),
        "files", "config.json: rope_parameters.rope_theta is 500.0, was released as 10000.0",
    ),
    "another rope_theta, in the logits": (
        "shards",
        lambda folder: edited(
            folder, "config.json", rope_parameters={"rope_theta": 500.0, "rope_type": "default"}
        ),
        "logits", "PyTorch's differ from the released ones by",
    ),
    "a proof that was edited": (
        "sft", lambda folder: edited(folder, "proof.json", base="x"), "proof", "was changed after",
    ),
    "a report that was edited": (
        "sft", lambda folder: edited(folder, "export_report.json", tensors={}),
        "proof", "proof.json and export_report.json are of different releases",
    ),
    "other safetensors added": (
        "sft",
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors"),
        "files", "model-2.safetensors: was not released",
    ),
    "other safetensors added to shards": (
        "shards", lambda folder: (folder / "consolidated.safetensors").write_bytes(b"x"),
        "files", "consolidated.safetensors: was not released",
    ),
    "a whole model added": (
        "adapter", lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
        "files", "model.safetensors: was not released",
    ),
    "pickled weights added": (
        "sft", lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
        "files", "pytorch_model.bin: was not released",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def releases(ground):
    """Releases to damage, outside of their run folders; and other weights for the adapter."""
    for name in ("sft", "adapter"):
        copied(ground / name / "hf", ground / "releases" / name)
    sharded(ground, ground / "releases/shards")
    return ground / "releases"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault, ground, releases, tmp_path, capsys):
    name, damage, check, message = FAULTS[fault]
    folder = copied(releases / name, tmp_path / "release")
    if "another base" in fault:
        tiny.save(tmp_path / "base", tiny.CONFIGS["llama"], std=0.1)
    damage(folder)
    lines, ok = lines_of(folder, capsys)
    assert not ok and lines[check].startswith("WRONG") and message in lines[check], lines


@pytest.fixture(scope="module")
def others(ground):
    """A run of the same model and options on other data, and releases of both."""
    rows = tiny.write_rows(ground / "other.jsonl", tiny.sft_rows(40, seed=1))
    common = {"max_steps": 3, "optimizer.warmup_steps": 1, "export": True, "data.eval": 0.1}
    runs.train("sft", ground / "gpt2", rows, ground / "other", **common)
    return ground


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, check, message",
    [
        (["proof.json"], "proof", "proof.json and export_report.json are of different releases"),
        (["proof.json", "export_report.json"], "tensors", "no tensor is as in proof.json"),
        (["README.md"], "card", "README.md: Details: released with | Data | sft.jsonl"),
        (
            ["proof.json", "export_report.json", "README.md", WEIGHTS],
            "run", "config.yaml: its data_fingerprint is of other data; metrics.jsonl: eval_",
        ),
    ],
)  # fmt: skip
def test_files_of_another_run_are_found(names, check, message, others, tmp_path, capsys):
    run = copied(others / "sft", tmp_path / "run")
    for name in names:
        shutil.copy(others / "other/hf" / name, run / "hf" / name)
    lines, ok = lines_of(run / "hf", capsys)
    assert not ok and lines[check].startswith("WRONG") and message in lines[check], lines


@pytest.mark.slow
def test_metrics_that_were_changed_are_found(ground, tmp_path, capsys):
    run = copied(ground / "sft", tmp_path / "run")
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[-1]["eval_loss"] -= 1
    tiny.write_rows(file, rows)
    lines, _ = lines_of(run / "hf", capsys)
    assert "metrics.jsonl: eval_loss is" in lines["run"] and lines["card"].startswith("ok")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["optimizer"]["learning_rate"] = 1e-2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines, _ = lines_of(run / "hf", capsys)
    assert "config.yaml: optimizer.learning_rate is 0.01, was released as 0.001" in lines["run"]


@pytest.mark.slow
def test_a_child_process_gives_the_logits_of_this_process(ground):
    """Of an adapter of a scorer, which has a base and is padded."""
    prompts = [[5, 6, 7], [8, 9]]
    arguments = (ground / "scoring adapter/hf", prompts, ground / "bert")
    for ours, theirs in zip(
        in_process.logits(*arguments), in_process.logits_in_child(*arguments), strict=True
    ):
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.slow
def test_the_command_exits_with_0_or_2_and_prints_json(ground, tmp_path, capsys):
    """Where it fails, in a process of its own, which starts another one for PyTorch."""
    folder = copied(ground / "sft/hf", tmp_path / "release")
    status, out, err = call(verify.main, [folder, "--json"], capsys)
    assert status == 0, err
    content = json.loads(out)
    assert content["ok"] and {check["ok"] for check in content["checks"]} == {True}
    edited(folder, "config.json", n_head=2)
    command = [sys.executable, "-m", "easyaira", "verify", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {folder}: not what was released: files, logits\n"
    wrong = [c for c in json.loads(done.stdout)["checks"] if not c["ok"]]
    assert wrong[0]["message"] == "config.json: n_head is 2, was released as 4"


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "holds no proof.json"),
        (lambda folder: proof_of(folder, "[]"), "proof.json: holds a list, expected an object"),
        (lambda folder: proof_of(folder, "{"), "proof.json: cannot be read: not JSON"),
        (lambda folder: proof_of(folder, '{"format": 2}'), "format is 2, expected 1"),
    ],
)
def test_a_folder_without_a_proof_is_refused(make, problem, tmp_path, capsys):
    make(tmp_path / "release")
    with pytest.raises(SystemExit) as end:
        cli.run_command(verify.main, [str(tmp_path / "release")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and problem in err and err.count("\n") == 1


def proof_of(folder, text):
    folder.mkdir()
    (folder / "proof.json").write_text(text)


def test_a_proof_of_another_form_fails_each_check_in_one_line(tmp_path, capsys):
    proof_of(tmp_path / "release", '{"format": 1, "base": null, "run": null, "files": 3}')
    lines, ok = lines_of(tmp_path / "release", capsys)
    assert not ok and all(line.startswith("WRONG") for line in lines.values())


@pytest.mark.slow
def test_a_proof_names_what_the_weights_were_made_from(ground):
    release = json.loads((ground / "sft/hf/proof.json").read_text())
    report = json.loads((ground / "sft/hf/export_report.json").read_text())
    assert release["tensors"] == report["tensors"] and "prompts" not in report["logits"]
    assert report["logits"].items() <= release["logits"].items()
    run = release["run"]
    assert run["configuration"]["data"]["train"] == "sft.jsonl"
    assert run["configuration"]["optimizer"]["learning_rate"] == 1e-3
    assert run["start"]["name"] == "gpt2" and len(run["start"]["sampled_sha256"]) == 64
    assert run["code"]["code_sha256"] == proof.code_hash() and run["updates"] == 3
    assert run["metrics"]["after"]["eval_loss"] < run["metrics"]["before"]["eval_loss"]
    adapter = json.loads((ground / "adapter/hf/proof.json").read_text())
    assert adapter["base"]["name"] == "llama" and len(adapter["base"]["sha256"]) == 64
    for content in (release, adapter["run"], adapter["base"]):
        assert str(ground) not in json.dumps(content)


def test_a_folder_that_is_no_release_gets_a_hint(models):
    with pytest.raises(ConfigError, match="write it again with easyaira convert to_hf"):
        verify.main([str(models / "gpt2")])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "adapter", "llama ours"])
def test_checkpoints_of_a_healthy_run_are_not_accused(name, ground, tmp_path, capsys):
    if name == "llama ours":
        converted(ground, "llama", tmp_path / "release")  # by way of this folder
    lines, ok = lines_of(ground / name, capsys)
    assert ok and len(lines) == 1 and "as saved" in lines["0" if "ours" in name else "3"]


@pytest.mark.slow
@pytest.mark.parametrize("item", ["params", "opt_state", "meta", "data", "sums"])
def test_a_bit_of_a_checkpoint_is_found(item, ground, tmp_path, capsys):
    copied(ground / "sft", tmp_path / "run")
    folder = tmp_path / f"run/checkpoints/3/{item}"
    file = folder / "metadata"  # of a record
    if not file.exists():  # of arrays
        file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    lines, ok = lines_of(tmp_path / "run", capsys)
    assert not ok and lines["3"].startswith("WRONG   3")


NAMED = "base_model_name_or_path"


def adapted_from(base, ground, out, folder=None):
    """A DPO run with an adapter on the weights of another run; returns its adapter_config.json."""
    common = {"max_steps": 1, "optimizer.warmup_steps": 0, "export": True}
    targets = "c_attn" if base == "sft" else "q_proj"
    lora = f"--lora={{r: 2, alpha: 4, target_modules: [{targets}]}}"
    runs.train("dpo", folder or ground / base, ground, out, lora, **common)
    return json.loads((out / "hf/adapter_config.json").read_text())


@pytest.mark.slow
def test_an_adapter_on_a_run_names_the_release_of_that_run(ground, tmp_path, capsys):
    config = adapted_from("sft", ground, tmp_path / "run")
    assert config[NAMED] == str(ground / "sft/hf")
    assert "warning: hf/" not in capsys.readouterr().out
    lines, ok = lines_of(tmp_path / "run/hf", capsys)
    assert ok and lines["logits"].startswith("ok")  # peft loaded it


@pytest.mark.slow
def test_an_adapter_on_a_rounded_run_says_before_the_first_update_what_its_base_needs(
    ground, tmp_path, capsys
):
    copied(ground / "sft", tmp_path / "sft")
    file = tmp_path / "sft/hf/proof.json"
    file.write_text(file.read_text().replace('"float32"', '"bfloat16"'))
    place = adapted_from("sft", ground, tmp_path / "run", tmp_path / "sft")[NAMED]
    out = capsys.readouterr().out
    needed = f"`easyaira convert to_hf {place} BASE` and name BASE in its adapter_config"
    assert place == str(tmp_path / "sft/checkpoints/3")
    assert needed in out and out.index(needed) < out.index("step 1: ")
    card = (tmp_path / "run/hf/README.md").read_text()
    assert card.index("to_hf sft/checkpoints/3 BASE`") < card.index("AutoPeftModel")
    convert.main(["to_hf", place, str(tmp_path / "base")])  # as told
    file = tmp_path / "run/hf/adapter_config.json"
    file.write_text(file.read_text().replace(place, str(tmp_path / "base")))
    theirs, ours = (
        torch_check.torch_logits(folder, [[1, 2, 3]], base)[0]
        for folder, base in (
            (tmp_path / "run/hf", tmp_path / "base"),
            (converted_run(tmp_path), None),
        )
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


WAYS = {  # how an adapter is named as a model: what the refusal says
    "adapter": "and {adapter}/hf in lora.adapter; to train a new one, merge it first: "
    "`easyaira convert to_hf {adapter} MERGED --merge`, and name MERGED",
    "adapter/checkpoints/3": "and ADAPTER in lora.adapter (made by `easyaira convert to_hf "
    "{adapter}/checkpoints/3 ADAPTER`); to train a new one, merge it first: `easyaira convert "
    "to_hf {adapter}/checkpoints/3 MERGED --merge`, and name MERGED",
    "adapter/hf": "and {adapter}/hf in lora.adapter; to train a new one, merge it in peft first",
}


@pytest.mark.parametrize("quantize", ["null", "nf4"])
@pytest.mark.parametrize("task", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("name", WAYS)
def test_an_adapter_on_an_adapter_is_refused_with_both_ways(name, task, quantize, ground, tmp_path):
    """Nobody could load it: its base would be a folder of checkpoints."""
    lora = f"--lora={{r: 2, alpha: 4, target_modules: [q_proj], quantize: {quantize}}}"
    export = not (name == "adapter/hf" and task == "dpo")  # of a bare adapter, in any case
    options = {"max_steps": 1, "optimizer.warmup_steps": 0, "export": export}
    with pytest.raises(ConfigError) as refused:
        runs.train(task, ground / name, ground, tmp_path / "run", lora, **options)
    wanted = WAYS[name].format(adapter=ground / "adapter")
    assert wanted in str(refused.value) and "\n" not in str(refused.value)
    assert f"its base, {ground / 'llama'}, in" in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["null", "int8", "nf4"])
@pytest.mark.parametrize("way", ["further", "merged"])
def test_both_ways_end_in_an_adapter_that_peft_loads(way, quantize, ground, tmp_path):
    targets = f"r: 4, alpha: 8, target_modules: [q_proj, v_proj], quantize: {quantize}"
    options = {"max_steps": 2, "optimizer.warmup_steps": 0, "export": True}
    first = ground / ("adapter" if quantize == "null" else f"adapter {quantize}")
    base, own = ground / "llama", f"--lora={{{targets}}}"
    if not first.exists():  # by the other way
        runs.train("sft", base, ground, first, own, **options)
    if way == "merged":
        base = to_hf(first, tmp_path / "merged", "--merge")
    else:
        own = f"--lora={{{targets}, adapter: {first / 'hf'}}}"
    runs.train("dpo", base, ground, tmp_path / "run", own, **options)
    folder = tmp_path / "run/hf"
    assert json.loads((folder / "adapter_config.json").read_text())[NAMED] == str(base)
    report = json.loads((folder / "export_report.json").read_text())
    assert report["logits"]["compared"]  # peft loaded it


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "other"])
def test_an_adapter_that_goes_on_on_another_base_is_told(base, ground, tmp_path, capsys):
    model = ground / "llama"
    if base == "other":
        model = tmp_path / "llama"  # the same name, and other weights
        tiny.save(model, tiny.CONFIGS["llama"], std=0.19)
    adapter = ground / "adapter/hf"
    lora = f"--lora={{r: 4, alpha: 8, target_modules: [q_proj, v_proj], adapter: {adapter}}}"
    options = {"max_steps": 1, "optimizer.warmup_steps": 0}
    capsys.readouterr()
    runs.train("sft", model, ground, tmp_path / "run", lora, **options)
    out = " ".join(capsys.readouterr().out.split())
    line = f"warning: lora.adapter: {adapter} was trained on llama, and {model} holds other weights"
    assert (line in out) == (base == "other")
    assert out.count("warning: lora.adapter") == (base == "other")


def converted_run(folder):
    return to_hf(folder / "run", folder / "merged", "--merge")


OTHER_RELEASES = {
    "of another update": ("updates", lambda record: record["run"] | {"updates": 2}),
    "rounded": ("tensors", lambda record: {"x": {"dtype": "bfloat16"}}),
    "an adapter": ("base", lambda record: {"name": "x"}),
    "of no run": ("run", lambda record: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", OTHER_RELEASES)
def test_a_release_of_other_weights_is_no_base(how, ground, tmp_path):
    copied(ground / "sft", tmp_path / "sft")
    key, value = OTHER_RELEASES[how]
    file = tmp_path / "sft/hf/proof.json"
    record = json.loads(file.read_text())
    record["run" if key == "updates" else key] = value(record)
    assert adapter_base.loadable(find(str(tmp_path / "sft"))) is not None
    file.write_text(json.dumps(record))
    assert adapter_base.loadable(find(str(tmp_path / "sft"))) is None


@pytest.mark.slow
def test_a_release_whose_proof_lies_is_no_base(ground, tmp_path):
    """Its tensors and hashes are those of other weights than the checkpoint's."""
    copied(ground / "sft", tmp_path / "sft")
    one_bit(tmp_path / "sft/hf")
    (tmp_path / "sft/hf/export_report.json").unlink()
    base = find(str(tmp_path / "sft"))
    model = model_of(base.config, "run")
    assert adapter_base.loadable(base) is not None
    assert adapter_base.compared(base, model, meshes.make_mesh("fsdp=-1")) is None
