"""Reward and toxicity models from start to end: the command, its numbers, the released folder."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from easyaira import convert, generate
from easyaira.config.run import DryRun
from easyaira.distributed import mesh as meshes
from easyaira.distributed.tree import path_of
from easyaira.errors import ConfigError, EasyAiraError, TokenizerError, WeightsError
from easyaira.lora import peft
from easyaira.losses.scores import binary, bradley_terry, centering, roc_auc
from easyaira.models import registry
from easyaira.plan import cost
from easyaira.plan import report as plan_report
from easyaira.run.run import run
from easyaira.storage import pretrained
from easyaira.storage.checkpoints import Checkpoints
from easyaira.train import log
from easyaira.train.resolve import find
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.loops import torch_adamw, torch_rate, torch_step
from helpers.runs import STEPS, close, configure, losses_of, result, same_bits, train

BASES = {
    **{kind: tiny.SCORERS[kind] for kind in ("bert", "roberta")},
    **{kind: tiny.CONFIGS[kind] for kind in ("gpt2", "llama")},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Models and data to run on. Encoders are stored with a head, decoders without."""
    texts = tiny.label_rows(60)
    good, bad = ([r["text"] for r in texts if r["label"] == label] for label in (0, 1))
    return tiny.ground(
        tmp_path_factory.mktemp("ground"),
        BASES,
        pair=tiny.dpo_rows(40),
        weighted=tiny.weighted_rows(40),
        label=tiny.label_rows(40),
        texts=[{"harmless": a, "harmful": b} for a, b in zip(good, bad, strict=False)],
    )


def reward(ground, kind, data):
    """A run on them, for `configure` and `train`."""
    return "reward", ground / kind, ground / f"{data}.jsonl"


def their_scores(folder, sequences):
    """Of the released folder, in a batch, with padding behind."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    width, pad = max(map(len, sequences)), model.config.pad_token_id
    ids = [[*s, *[pad] * (width - len(s))] for s in sequences]
    mask = [[1] * len(s) + [0] * (width - len(s)) for s in sequences]
    with torch.no_grad():
        out = model.eval()(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    return out.logits[:, 0].numpy()


def sequences_of(examples, answer):
    """The tokens of each example's prompt with one of its answers."""
    e, rows = examples, []
    for bounds in e.bounds:
        at = slice(bounds[1 + answer], bounds[2 + answer])
        rows.append(e.tokens[bounds[0] : bounds[1]].tolist() + e.tokens[at].tolist())
    return rows


# ---------------------------------------------------------------------------------------------
# numbers


def test_losses_of_scores():
    one = jnp.float32([1.0])
    assert bradley_terry(one, 0 * one)[0] == pytest.approx(0.313262, abs=1e-6)
    assert bradley_terry(one, 0 * one, margin=1.0)[0] == pytest.approx(math.log(2))
    margins = jnp.float32([0.0, 1.0])
    ones = jnp.ones(2)
    wanted = [0.313262, math.log(2)]
    np.testing.assert_allclose(bradley_terry(ones, 0 * ones, margin=margins), wanted, 1e-5)
    np.testing.assert_allclose(centering(ones, jnp.float32([-1.0, 2.0])), [0, 9])
    scores = jnp.float32([3.0, -0.5, 40.0, -40.0])
    for labels in ([1, 0, 1, 0], [0, 1, 0, 1]):
        wanted = F.binary_cross_entropy_with_logits(
            torch.tensor(scores.tolist()), torch.tensor(labels).float(), reduction="none"
        )
        np.testing.assert_allclose(binary(scores, jnp.bool_(labels)), wanted, 1e-5, 1e-7)


def test_auc_is_exact():
    assert roc_auc(np.array([1.0, 2.0]), np.array([0.0, -1.0])) == 1.0
    assert roc_auc(np.array([1.0]), np.array([1.0])) == 0.5
    assert roc_auc(np.array([]), np.array([1.0])) is None
    rng = np.random.default_rng(0)
    better, worse = rng.integers(0, 9, 50) / 8, rng.integers(0, 7, 40) / 8  # with many ties
    wins = [(b > w) + (b == w) / 2 for b in better for w in worse]
    assert roc_auc(better, worse) == sum(wins) / 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, data", [("bert", "weighted"), ("roberta", "label"), ("gpt2", "texts")]
)
def test_a_run_follows_a_torch_loop(kind, data, ground, tmp_path):
    """Of 20 rows, so that every third update has four instead of eight; packed and accumulated."""
    options = {"data.max_examples": 20, "reward.margin": 0.5, "gradient_accumulation_steps": 4}
    weighted = data == "weighted"
    options |= {"reward.center_rewards_coefficient": 0.1} if weighted else {}
    rows, params = train(*reward(ground, kind, data), tmp_path / "run", **options)
    setup = prepare(*configure(*reward(ground, kind, data), tmp_path / "x", **options))
    examples = setup.batches.examples
    config = tiny.SCORERS[kind]
    model = tiny.torch_model(config | {"vocab_size": setup.model.vocab_size})
    with torch.no_grad():  # the head of a decoder, and the padding token's row, are new
        ours = tiny.as_theirs(setup.model, setup.start_weights())
        model.load_state_dict({n: torch.tensor(t) for n, t in ours.items()}, strict=True)
    adamw = torch_adamw(model)

    def scores(update, answer):
        sequences = sequences_of(examples.take(setup.batches.members(update)), answer)
        return torch.cat([model(input_ids=torch.tensor([s])).logits[0] for s in sequences])

    for step, row in enumerate(rows):
        if data == "label":
            labels = torch.tensor(examples.labels[setup.batches.members(step)])
            margins = (1 - 2 * labels) * scores(step, 0)
            loss = F.binary_cross_entropy_with_logits(scores(step, 0), 1 - labels)
        else:
            chosen, rejected = scores(step, 0), scores(step, 1)
            members = setup.batches.members(step)
            margins = chosen - rejected
            wanted = torch.tensor(examples.margins[members]).nan_to_num(0.5)
            losses = -F.logsigmoid(margins - wanted)
            losses += 0.1 * (chosen + rejected) ** 2 if weighted else 0
            loss = (losses * torch.tensor(examples.weights[members]).nan_to_num(1)).mean()
            assert weighted == bool(np.nansum(examples.margins[members]))
        torch_step(model, adamw, loss, torch_rate(step, STEPS["reward"]))
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert row["margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
        assert row["accuracy"] == pytest.approx((margins > 0).float().mean().item())


@pytest.mark.slow
def test_packed_accumulated_and_shared_runs_are_the_same_run(ground, tmp_path):
    args, plain = reward(ground, "gpt2", "pair"), {"data.packing": False}
    rows, params = train(*args, tmp_path / "plain", **plain, **{"data.share_prompt": "never"})
    options = {"gradient_accumulation_steps": 4, "data.share_prompt": "always"}
    other_rows, other = train(*args, tmp_path / "other", **options)
    np.testing.assert_allclose(losses_of(other_rows), losses_of(rows), atol=1e-5)
    close(other, params, 1e-4)


# ---------------------------------------------------------------------------------------------
# from start to end


@pytest.fixture(scope="module")
def released(ground, tmp_path_factory):
    """Runs with their exports: (kind, data) -> run folder."""
    root, folders = tmp_path_factory.mktemp("released"), {}
    options = {"export": True, "data.eval": 0.2, "reward.label": "GOOD"}
    for kind, data in (("bert", "pair"), ("roberta", "label"), ("llama", "pair")):
        folders[kind, data] = root / kind
        config, algorithm = configure(*reward(ground, kind, data), root / kind, **options)
        run(config, algorithm, dry_run=False)
    return folders


@pytest.mark.slow
def test_what_is_written(released, ground):
    for (kind, _), folder in released.items():
        rows = log.read(folder / "metrics.jsonl")
        measured = {"eval_loss", "eval_accuracy", "eval_margin", "eval_auc"}
        assert measured <= rows[0].keys() and measured <= rows[-1].keys()
        assert {"loss", "accuracy", "margin"} <= rows[1].keys()
        assert not (folder / "samples.json").exists()
        proof = json.loads((folder / "hf/export_report.json").read_text())["logits"]
        assert proof["compared"] and proof["max_difference"] <= 1e-4
        config = json.loads((folder / "hf/config.json").read_text())
        assert config["architectures"] == [tiny.SCORERS[kind]["architectures"][0]]
        assert config["id2label"] == {"0": "GOOD"} and config["label2id"] == {"GOOD": 0}
        card = (folder / "hf/README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front["pipeline_tag"] == "text-classification" and "| auc |" in card
        assert not (folder / "hf/generation_config.json").exists()
        chat = (folder / "hf/chat_template.jinja").exists()
        assert chat == (kind == "llama"), "an encoder has no chat template"


@pytest.mark.slow
def test_scores_of_the_released_folder_are_those_that_were_measured(released, ground):
    """In torch, in a padded batch, each with all others as batch mates; and the last AUC and
    accuracy are those of all held-out scores."""
    for (kind, data), folder in released.items():
        config, algorithm = configure(
            *reward(ground, kind, data), folder, **{"data.eval": 0.2, "reward.label": "GOOD"}
        )
        held_out = prepare(config, algorithm).data.held_out
        last = log.read(folder / "metrics.jsonl")[-1]
        first = their_scores(folder / "hf", sequences_of(held_out, 0))
        if data == "pair":
            better, worse = first, their_scores(folder / "hf", sequences_of(held_out, 1))
            right = better > worse
        else:
            better, worse = first[held_out.labels == 0], first[held_out.labels == 1]
            right = np.concatenate([better > 0, worse < 0])
        alone = [their_scores(folder / "hf", [s])[0] for s in sequences_of(held_out, 0)[:3]]
        np.testing.assert_allclose(alone, first[:3], atol=1e-5)
        assert last["eval_accuracy"] == pytest.approx(right.mean())
        wins = [(b > w) + (b == w) / 2 for b in better for w in worse]
        assert last["eval_auc"] == pytest.approx(np.mean(wins), abs=2e-2)


@pytest.mark.slow
def test_the_code_on_the_card_runs_and_gives_our_score(released, ground, capsys):
    for (kind, data), folder in released.items():
        card = (folder / "hf/README.md").read_text()
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        exec(code.replace("path/to/this/folder", str(folder / "hf")), {})  # noqa: S102
        printed = float(capsys.readouterr().out.strip().splitlines()[-1])
        config, algorithm = configure(*reward(ground, kind, data), folder)
        template = find(config, meshes.make_mesh("fsdp=-1"), True).template
        if data == "label":
            tokens = template.judged(["You are welcome."])[0]
        else:
            turns = [("user", "How are you?"), ("assistant", "Fine, thank you.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            tokens = np.concatenate([part for part, _ in template.encode([messages])[0]])
        model, params = tiny.load(folder / "hf")
        score = model.score(params, tiny.layout(tokens[None]), examples=1, answers=1)[0]
        assert printed == pytest.approx(float(score[0, 0]), abs=1e-4)


@pytest.mark.slow
def test_transformers_pipeline_gives_the_raw_score_under_its_label(released):
    folder = released["roberta", "label"] / "hf"
    answer = pipeline("text-classification", str(folder))("I like Paris")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    score = their_scores(folder, [tokenizer("I like Paris").input_ids])[0]
    assert answer == [{"label": "GOOD", "score": pytest.approx(float(score), abs=1e-5)}]


@pytest.mark.slow
def test_a_released_scorer_and_its_run_are_gone_on_with(released, ground, tmp_path):
    for kind, data in (("bert", "pair"), ("llama", "pair")):
        folder = released[kind, data]
        last = log.read(folder / "metrics.jsonl")[-1]
        for start in (folder, folder / "hf"):
            options = {"model.name_or_path": start, "data.eval": 0.2, "max_steps": 1}
            options["optimizer.warmup_steps"] = 0
            if kind == "llama":
                options["data.template"] = "chat"
            rows, _ = train(*reward(ground, kind, data), tmp_path / kind / start.name, **options)
            assert rows[0]["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-5)


@pytest.mark.slow
def test_a_language_model_that_was_fine_tuned_becomes_a_reward_model(ground, tmp_path, capsys):
    tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    options = {"data.template": "tulu", "max_steps": 2, "optimizer.warmup_steps": 0}
    train("sft", ground / "llama", tmp_path, tmp_path / "sft", **options)
    capsys.readouterr()
    options = {"model.name_or_path": tmp_path / "sft", "optimizer.learning_rate": 0.0}
    options |= {"max_steps": 1, "optimizer.warmup_steps": 0}
    _, params = train(*reward(ground, "llama", "pair"), tmp_path / "reward", **options)
    out = capsys.readouterr().out
    assert (
        "head    score/linear/kernel initialised with standard deviation 0.02 from seed 42" in out
    )
    checkpoints = Checkpoints(tmp_path / "sft/checkpoints")
    model = pretrained.find(str(tmp_path / "sft"))._saved
    before = checkpoints.restore_params(2, model.shapes)["model"]
    checkpoints.close()
    body = jax.tree.map(lambda a, b: (a[:300], b[:300]), params["model"], before)
    for ours, theirs in jax.tree.leaves(body, is_leaf=lambda x: isinstance(x, tuple)):
        assert np.array_equal(ours, theirs)
    assert set(params) == {"model", "score"}


@pytest.mark.slow
def test_a_dry_run_says_what_would_happen(ground, tmp_path, capsys):
    for kind, data in (("gpt2", "pair"), ("bert", "pair")):
        config, algorithm = configure(*reward(ground, kind, data), tmp_path / "run")
        run(config, algorithm, dry_run=DryRun())
        out = capsys.readouterr().out
        assert "memory per device" in out and "score/" in out
        assert ("head    " in out) == (kind == "gpt2")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------
# adapters

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}
TARGETS |= dict.fromkeys(("bert", "roberta"), ["query", "dense"])  # peft leaves a head's dense out
HEADS = {"bert": ["classifier", "pooler"], "roberta": ["classifier"], "llama": ["score"]}


@pytest.fixture(scope="module")
def lora_ground(ground, tmp_path_factory):
    """The same, with a padding token in the tokenizer of the decoder, which has no head."""
    root = tmp_path_factory.mktemp("lora")
    for path in ground.iterdir():
        (root / path.name).symlink_to(path) if path.name != "llama" else None
    tiny.save(root / "llama", BASES["llama"])
    tiny.tokenizer(pad="<pad>").save_pretrained(root / "llama")
    return root


def with_lora(kind, **options):
    return {"lora.target_modules": json.dumps(TARGETS[kind]), "lora.r": 4, **options}


def lora_setup(ground, kind, out, data="pair", **options):
    return prepare(*configure(*reward(ground, kind, data), out, **with_lora(kind, **options)))


def some_tokens(seed=0):
    return np.random.default_rng(seed).integers(2, tiny.VOCAB, (3, 12))


def scores_of(model, *trees):
    """Of each of the trees, the scores of some texts."""
    batch = tiny.layout(some_tokens(), segment_ids=np.arange(1, 4)[:, None].repeat(12, 1))
    score = jax.jit(lambda params: model.score(params, batch, examples=3, answers=1)[0])
    return [np.array(score(params)[:, 0]) for params in trees]


def drawn(adapter):
    """An adapter and a head that have been trained: nothing in them is zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), adapter.shapes)


def scores_in_peft(model):
    with torch.no_grad():
        rows = [torch.tensor(row[None]) for row in some_tokens()]
        return np.array([model.eval()(input_ids=row).logits[0, 0].item() for row in rows])


def peft_base(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_new_adapter_of_a_scorer_changes_no_bit_and_merges(kind, lora_ground, tmp_path, devices):
    whole = prepare(*configure(*reward(lora_ground, kind, "pair"), tmp_path / "x")).start_weights()
    setup = lora_setup(lora_ground, kind, tmp_path / "x")
    model, adapter, start = setup.model, setup.adapter, setup.trainable.start()
    same_bits(start["score"], whole["score"])  # stored, or drawn from the same seed
    assert "score" not in setup.trainable.base.params
    params = drawn(adapter)
    parts = (params | {"score": start["score"]}, params | {"model": start["model"]})
    merged = adapter.merge(whole, params)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    adapted = (setup.trainable.weights(tree) for tree in (start, params, *parts))
    before, after, new, tuned, *others = scores_of(model, whole, merged, *adapted)
    np.testing.assert_array_equal(new, before)
    np.testing.assert_allclose(tuned, after, atol=1e-5)
    for other in (new, *others):
        assert np.abs(other - tuned).max() > 0.01
    count = sum(leaf.size for leaf in jax.tree.leaves(whole["score"]))
    of_layers = sum(leaf.size for leaf in jax.tree.leaves(start["model"]))
    assert adapter.parameter_count() == count + of_layers
    share = (count + of_layers) / (model.parameter_count() + of_layers)
    text = plan_report.describe(setup)
    assert f"{count + of_layers:,} trainable parameters ({share:.4%})" in text
    assert f", and all of {', '.join(HEADS[kind])};" in text
    jax.tree.map(lambda leaf: leaf.delete(), start)  # as the first update does
    wanted = jax.device_get(setup.trainable.start())
    devices(8)
    divided = lora_setup(lora_ground, kind, tmp_path / "x", mesh="2,2,2")
    same_bits(jax.device_get(divided.trainable.start()), wanted)
    assert divided.trainable.base.fingerprint == setup.trainable.base.fingerprint


@pytest.mark.parametrize("kind, tables", [(k, []) for k in HEADS] + [("llama", ["embed_tokens"])])
@pytest.mark.slow
def test_scores_of_an_adapter_are_pefts_both_ways(kind, tables, lora_ground, tmp_path, recwarn):
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.numpy import load_file, save_file

    whole = {"lora.modules_to_save": json.dumps(tables)}
    setup = lora_setup(lora_ground, kind, tmp_path / "x", **whole)
    adapter = setup.adapter
    theirs = get_peft_model(
        peft_base(lora_ground / kind),
        LoraConfig(
            task_type="SEQ_CLS",
            r=4,
            lora_alpha=8,
            target_modules=TARGETS[kind],
            modules_to_save=[name for name in HEADS[kind] if name == "pooler"] + tables,
        ),
    )
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    params = peft.read_peft(adapter, tmp_path / "theirs")
    wanted = scores_in_peft(theirs)
    saved = load_file(tmp_path / "theirs/adapter_model.safetensors")
    tensors = peft.to_peft(adapter, params)
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, saved[name], err_msg=name)

    others, folder = drawn(adapter), tmp_path / "ours"
    folder.mkdir()
    save_file(peft.to_peft(adapter, others), folder / "adapter_model.safetensors", {"format": "pt"})
    config = peft.peft_config(adapter, "base", None)
    saved = config["modules_to_save"]
    assert config["task_type"] == "SEQ_CLS" and saved == sorted(HEADS[kind] + tables)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    recwarn.clear()
    loaded = PeftModel.from_pretrained(peft_base(lora_ground / kind), folder)
    assert not [w for w in recwarn if "missing" in str(w.message)]
    ours = scores_of(setup.model, setup.trainable.weights(params), setup.trainable.weights(others))
    np.testing.assert_allclose(ours, [wanted, scores_in_peft(loaded)], atol=1e-5)

    config["modules_to_save"] = [*saved, "norm"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="modules_to_save: is .*'norm'.*, but the run trains"):
        peft.read_peft(adapter, folder)
    tensors = {n: t for n, t in peft.to_peft(adapter, params).items() if "pooler" not in n}
    if kind == "bert":  # as peft saves one where nobody named the pooler
        with pytest.raises(WeightsError, match="pooler.dense.weight is missing.* modules_to_save"):
            peft.from_peft(adapter, tensors, "here")


def head_is_trained(params, setup):
    """Beside the adapter."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["score"]):
        before = setup.trainable.base.start["score"]
        for key in path:
            before = before[key.key]
        # the last bias is the same for both answers of a pair, so it learns nothing
        assert np.array_equal(leaf, before) == (path_of(path) == "classifier/bias"), path


@pytest.mark.slow
def test_the_head_is_trained_beside_the_adapter(lora_ground, tmp_path):
    options = with_lora("bert", **{"lora.dropout": 0.2, "optimizer.learning_rate": 2e-2})
    args = (*reward(lora_ground, "bert", "pair"), tmp_path / "run")
    _, params = train(*args, **options)
    head_is_trained(params, prepare(*configure(*args, **options)))


@pytest.mark.slow
def test_a_scorers_adapter_is_released_merged_and_gone_on_with(lora_ground, tmp_path, capsys):
    """From a language model, which has no head."""
    from peft import PeftModel

    before = {path.name: path.read_bytes() for path in (lora_ground / "llama").iterdir()}
    out, options = tmp_path / "run", {"data.eval": 0.2, "optimizer.learning_rate": 2e-2}
    config, algorithm = configure(
        *reward(lora_ground, "llama", "pair"), out, **with_lora("llama", export=True, **options)
    )
    run(config, algorithm, dry_run=False)
    assert "head    score/linear/kernel initialised" in capsys.readouterr().out
    _, params = result(config, algorithm)
    head_is_trained(params, prepare(config, algorithm))
    assert json.loads((out / "hf/export_report.json").read_text())["logits"]["compared"]
    convert.to_hf(str(out), str(tmp_path / "merged"), merge=True)
    assert "PyTorch logits within" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in (lora_ground / "llama").iterdir()}
    origin = pretrained.find(str(out))
    model = registry.model_of(origin.config, "run")
    [ours] = scores_of(model, origin.load(model, meshes.make_mesh("fsdp=-1")))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(peft_base(lora_ground / "llama"), out / "hf")
    for theirs in (merged, adapted):
        np.testing.assert_allclose(ours, scores_in_peft(theirs), atol=1e-5)

    front = yaml.safe_load((out / "hf/README.md").read_text().split("---")[1])
    assert front["library_name"] == "peft" and front["pipeline_tag"] == "text-classification"
    code = re.search(r"```python\n(.*?)```", (out / "hf/README.md").read_text(), re.DOTALL)[1]
    exec(code.replace("path/to/this/folder", str(out / "hf")), {})  # noqa: S102
    printed = float(capsys.readouterr().out.strip().splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    turns = [("user", "How are you?"), ("assistant", "Fine, thank you.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(messages, return_dict=True).input_ids
    assert printed == pytest.approx(their_scores(tmp_path / "merged", [ids])[0], abs=1e-5)

    for options in (
        with_lora("llama", **{"lora.adapter": out / "hf"}),
        {"model.name_or_path": out},
        with_lora("llama", **{"model.name_or_path": tmp_path / "merged"}),
    ):
        config, algorithm = configure(
            *reward(lora_ground, "llama", "pair"), tmp_path / "x", **options
        )
        setup = prepare(config, algorithm)
        assert "head    " not in plan_report.describe(setup)
        np.testing.assert_allclose(scores_of(model, setup.start_weights())[0], ours, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# data, and what is refused


def test_equal_texts_are_never_on_both_sides(ground, tmp_path):
    rows = [{"text": f"{word} I like", "label": 0} for word in ("yes", "no", "red", "blue")] * 5
    tiny.write_rows(tmp_path / "same.jsonl", rows)
    options = {"data.train": tmp_path / "same.jsonl", "data.eval": 0.25}
    config, algorithm = configure(*reward(ground, "bert", "label"), tmp_path / "x", **options)
    data = prepare(config, algorithm).data
    assert len(data.held_out) == 5 and len(data.train) == 15
    assert not set(data.held_out.prompt_ids) & set(data.train.prompt_ids)


@pytest.mark.parametrize("data, limit", [("pair", 20), ("label", 9)])
def test_an_encoder_cuts_as_its_tokenizer_does(data, limit, ground, tmp_path):
    options = {"data.max_length": limit, "data.max_dropped": 0.9}
    config, algorithm = configure(*reward(ground, "roberta", data), tmp_path / "x", **options)
    examples = prepare(config, algorithm).data.train
    tokenizer = AutoTokenizer.from_pretrained(ground / "roberta")
    rows = tiny.dpo_rows(40) if data == "pair" else tiny.label_rows(40)
    longest = 0
    for row, tokens in zip(np.array(rows)[examples.rows], sequences_of(examples, 0), strict=True):
        text = row["text"] if data == "label" else f"{row['prompt']}</s>{row['chosen']}"
        longest = max(longest, len(tokenizer(text).input_ids))
        assert tokens == tokenizer(text, truncation=True, max_length=limit).input_ids
    assert longest > limit


@pytest.mark.slow
def test_which_label_is_good_is_said_in_the_configuration(ground, tmp_path):
    args, options = reward(ground, "roberta", "label"), {"optimizer.warmup_steps": 0}
    options |= {"data.max_examples": 20, "gradient_accumulation_steps": 4, "max_steps": 1}
    options["reward.margin"] = 0.5  # labels have none; it makes the program that of the loop
    margins = []
    for label in (0, 1):
        options["reward.positive_label"] = label
        [row], _ = train(*args, tmp_path / str(label), **options)
        margins.append(row["margin"])
    assert margins[0] == pytest.approx(-margins[1])


def test_flops_are_those_of_products_with_every_token():
    from easyaira.models.registry import model_of

    model = model_of({"model_type": "bert", "vocab_size": 28996}, "config.json")
    D, F_, biases, norms = 768, 3072, 4 * 768 + 3072 + 768, 4 * 768
    layer = 4 * D * D + 2 * D * F_ + biases + norms
    assert cost.flops_per_token(model, False) == 6 * (12 * layer + 2 * D)


@pytest.mark.slow
def test_adapters_of_a_scorer_hold_the_padding_token_that_it_lacked(ground, tmp_path):
    options = {"lora.target_modules": "[q_proj]", "max_steps": 4, "export": True}
    train(*reward(ground, "llama", "pair"), tmp_path / "run", **options)
    hf = tmp_path / "run/hf"
    assert json.loads((hf / "export_report.json").read_text())["logits"]["compared"]
    written = json.loads((hf / "adapter_config.json").read_text())
    assert written["trainable_token_indices"] == [tiny.VOCAB]
    assert AutoTokenizer.from_pretrained(hf).pad_token_id == tiny.VOCAB


@pytest.mark.parametrize(
    "kind, data, options, error, message",
    [
        ("bert", "pair", {"data.share_prompt": "always"}, ConfigError, "cannot share a prompt"),
        ("bert", "pair", {"data.template": "tulu"}, ConfigError, "data.template: tulu is for"),
        ("gpt2", "label", {"data.share_prompt": "always"}, ConfigError, "only pairs have a prompt"),
        ("bert", "pair", {"num_samples": 2}, ConfigError, "num_samples: a reward model"),
        ("bert", "pair", {"generation.top_k": 3}, ConfigError, "generation: a reward model"),
        ("bert", "pair", {"data.reverse": True}, ConfigError, "data.reverse: is for SFT"),
        ("roberta", "pair", {"model.tokenizer": "bert"}, TokenizerError, "pads with 0"),
        ("bert", "pair", {"model.tokenizer": "gpt2"}, TokenizerError, "pads with None"),
    ],
)
def test_what_does_not_fit_is_refused(kind, data, options, error, message, ground, tmp_path):
    if "model.tokenizer" in options:
        options = {"model.tokenizer": ground / options["model.tokenizer"]}
    with pytest.raises(error, match=message):
        prepare(*configure(*reward(ground, kind, data), tmp_path / "x", **options))


@pytest.mark.slow
def test_who_cannot_write_is_refused_where_writing_is_asked_for(ground, released, tmp_path):
    tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    for task, folder, data, message in (
        ("sft", ground / "bert", tmp_path, "generates no text"),
        ("dpo", released["llama", "pair"], ground / "pair.jsonl", "reward or toxicity model"),
        (
            "dpo",
            released["llama", "pair"] / "hf",
            ground / "pair.jsonl",
            "reward or toxicity model",
        ),
    ):
        options = {"data.template": "plain"}
        with pytest.raises((ConfigError, WeightsError), match=message):
            prepare(*configure(task, folder, data, tmp_path / "x", **options))
    with pytest.raises(EasyAiraError, match="generates no text"):
        generate.main([str(ground / "bert"), "--prompt=Hi"])
