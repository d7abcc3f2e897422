"""Every architecture against transformers: logits, loss, gradients, the folder there and back."""

import json
import re
import sys
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from easyaira import convert
from easyaira.export import torch_check
from easyaira.losses import token_logps
from easyaira.models.embedding import Embedding
from easyaira.models.registry import MODELS
from helpers import tiny

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import parity

PADDED = 12  # tokens of a row, of which the first or last few are padding


def test_every_architecture_is_covered():
    writers = {kind for kind, architecture in MODELS.items() if not architecture.encoder}
    assert {case["model_type"] for case in tiny.CASES.values()} == writers


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Transformers' model of a case, ours, its parameters, and what is compared, compiled once."""

    once = tiny.loaded_once(tmp_path_factory, tiny.CASES)

    @cache
    def load(case):
        theirs, model, params = once(case)

        def loss_fn(params, rows, learned):
            hidden, head = model.apply(params, rows)
            out = token_logps.token_logps(hidden, head, rows["tokens"], **model.head_options)
            return -(out.logps * learned).sum() / learned.sum(), model.logits(hidden, head)

        return theirs, model, params, jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

    return load


def batch(side: str):
    """Tokens, and which of them are real, with padding on one side or none."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, tiny.VOCAB, (3, PADDED))
    real = np.ones((3, PADDED), bool)
    for row, count in enumerate((0, 3, 7)):
        if side == "left":
            real[row, :count] = False
        elif side == "right":
            real[row, PADDED - count :] = False
    return tokens, real


@pytest.mark.slow
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("case", tiny.CASES)
def test_logits_loss_and_gradients(case, side, loaded):
    theirs, model, params, value_and_grad = loaded(case)
    tokens, real = batch(side)
    positions = np.maximum(real.cumsum(1) - 1, 0)
    learned = real.copy()
    learned[:, 1:] &= real[:, :-1]  # a target whose source is padding is nobody's business
    learned[:, 0] = False

    ids = torch.tensor(tokens)
    out = theirs(
        input_ids=ids,
        attention_mask=torch.tensor(real).long(),
        position_ids=torch.tensor(positions),
    )
    logps = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    their_loss = -(logps * torch.tensor(learned[:, 1:])).sum() / learned.sum()
    theirs.zero_grad()
    their_loss.backward()
    rows = tiny.layout(tokens, segment_ids=real.astype(int), positions=positions)
    (loss, logits), grads = value_and_grad(params, rows, learned)
    their_logits = out.logits.detach().numpy()
    scale = np.abs(their_logits[real]).max()
    assert np.abs(logits - their_logits)[real].max() <= 1e-5 * max(scale, 1)
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
    grads = tiny.as_theirs(model, grads)
    for name, wanted in tiny.gradients(theirs).items():
        difference = np.abs(grads.pop(name) - wanted).max()
        assert difference <= 1e-5 * max(np.abs(wanted).max(), 1), name
    assert not grads


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in tiny.CASES]
    + [("gpt2", torch.float16), ("llama", torch.bfloat16), ("mixtral", torch.bfloat16)],
)
def test_there_and_back_bit_for_bit(case, dtype, tmp_path, monkeypatch):
    skipped = {"compared": False, "why": "test_logits_loss_and_gradients compares"}
    monkeypatch.setattr(torch_check, "compare_logits", lambda *_, **__: skipped)
    theirs = tiny.save(tmp_path / "hf", tiny.CASES[case], dtype=dtype)
    convert.from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"))
    convert.to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "back", dtype="auto", output_loading_info=True
        )
    assert not any(info.values()), info
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "back")]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_tied_weights_follow_each_other_after_export(tmp_path):
    tiny.save(tmp_path / "hf", tiny.CASES["gpt2"])
    convert.from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"))
    convert.to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        back.transformer.wte.weight[5] += 1
    assert torch.equal(back.lm_head.weight, back.transformer.wte.weight)


@pytest.mark.slow
@pytest.mark.parametrize("case", tiny.ATTENTION)
def test_no_token_sees_its_future_or_another_segment(case, loaded):
    _, model, params, _ = loaded(case)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny.VOCAB, (1, 12))
    segments = np.repeat([[1, 2, 0]], [5, 5, 2], axis=1)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0]])
    apply = jax.jit(model.apply)

    def hidden(tokens):
        rows = tiny.layout(tokens, segment_ids=segments, positions=positions)
        return np.asarray(apply(params, rows)[0][0])

    before = hidden(tokens)
    for place, end in ((2, 5), (7, 10)):  # a token of the first segment, then one of the second
        changed = tokens.copy()
        changed[0, place] = (tokens[0, place] + 1) % tiny.VOCAB
        after = hidden(changed)
        same = [i for i in range(10) if not place <= i < end]
        assert np.array_equal(before[same], after[same])  # bitwise
        assert (np.abs(before[place:end] - after[place:end]).max(-1) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", [*tiny.CONFIGS, "gemma3"])
def test_prompt_shared_by_two_answers_equals_two_sequences(case, loaded):
    """One row of prompt, [its last token, chosen], [the same, rejected] says what two rows say."""
    _, model, params, _ = loaded(case)
    rng = np.random.default_rng(0)
    prompt, chosen, rejected = (rng.integers(0, tiny.VOCAB, n) for n in (5, 4, 6))
    apart = [np.concatenate([prompt, answer]) for answer in (chosen, rejected)]
    tokens = np.concatenate([prompt[:-1], prompt[-1:], chosen, prompt[-1:], rejected])
    positions = np.concatenate([np.arange(4), 4 + np.arange(5), 4 + np.arange(7)])
    sides = np.repeat([0, 1, 2], [4, 5, 7])
    rows = tiny.layout(tokens[None], sides=sides[None], positions=positions[None])

    @jax.jit
    def compared(params, rows, *apart):
        return [model.apply(params, each)[0][0] for each in (rows, *apart)]

    hidden, *alone = compared(params, rows, *(tiny.layout(row[None]) for row in apart))
    wanted = [np.asarray(each)[4:] for each in alone]
    np.testing.assert_allclose(hidden[4:9], wanted[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(hidden[9:16], wanted[1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dots", "full"])
def test_gradient_checkpointing_changes_no_number(policy, loaded):
    _, model, params, _ = loaded("llama")
    rows = tiny.layout(batch("none")[0])
    saving = replace(model, compute=replace(model.compute, gradient_checkpointing=policy))

    def gradients(model):
        def loss(params, rows):
            return (model.apply(params, rows)[0] ** 2).sum()

        return jax.jit(jax.grad(loss))(params, rows)

    plain, saved = map(gradients, (model, saving))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, saved)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_gives_float32_gradients(tmp_path):
    tiny.save(tmp_path, tiny.CASES["llama"], std=0.05)
    model, params = tiny.load(tmp_path)
    low = model.with_dtype(jnp.bfloat16)
    rows = tiny.layout(batch("none")[0])

    def loss_fn(params, model):
        hidden, head = model.apply(params, rows)
        return token_logps.token_logps(
            hidden, head, rows["tokens"], vocab_size=300, cap=None
        ).logps.mean()

    (high_loss, high_grads), (low_loss, low_grads) = (
        jax.jit(jax.value_and_grad(partial(loss_fn, model=m)))(params) for m in (model, low)
    )
    assert low_loss.dtype == jnp.float32
    np.testing.assert_allclose(low_loss, high_loss, rtol=5e-3)
    for a, b in zip(jax.tree.leaves(low_grads), jax.tree.leaves(high_grads), strict=True):
        assert a.dtype == jnp.float32
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 0.05 * max(np.linalg.norm(b), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_dropout_is_active_with_a_key_and_only_then(case, loaded):
    _, model, params, _ = loaded(case)
    dropping = replace(model, compute=replace(model.compute, dropout=0.5))
    rows = tiny.layout(batch("none")[0])
    plain = jax.jit(model.apply)(params, rows)[0]
    apply = jax.jit(dropping.apply)
    first, same, other = (apply(params, rows, jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_allclose(apply(params, rows)[0], plain, rtol=1e-4, atol=1e-4)
    assert jnp.array_equal(first, same) and not jnp.allclose(first, other)


def test_a_token_that_occurs_often_has_its_gradient_summed_in_float32():
    """bfloat16 holds 256 + 1 as 256, so 4,096 ones would add up to that."""
    table = Embedding(8, 4, 0.02)
    ids = jnp.zeros((8, 512), jnp.int32)
    params = table.init(jax.random.key(0), ids, jnp.bfloat16)

    def total(params):
        return table.apply(params, ids, jnp.bfloat16).astype(jnp.float32).sum()

    gradient = jax.grad(total)(params)["params"]["embedding"]
    np.testing.assert_array_equal(gradient[0], np.full(4, 4096.0))
    np.testing.assert_array_equal(gradient[1:], 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind, objective", [("gpt2", "sft"), ("llama", "dpo"), ("bert", "reward")])
def test_the_script_behind_the_page_finds_no_difference(kind, objective, tmp_path):
    differences = parity.compare(kind, objective, tmp_path, None, updates=5)
    assert differences.keys() == {"logits", "loss", "gradients", "curve"}
    assert {name: x for name, x in differences.items() if not x <= parity.TOLERANCES[name]} == {}


@pytest.mark.slow
def test_the_script_finds_a_difference(tmp_path):
    def other(objective, *args):
        return 1.001 * theirs(objective, *args)

    theirs = parity.torch_loss
    with mock.patch.object(parity, "torch_loss", other):  # which nothing traces
        differences = parity.compare("gpt2", "sft", tmp_path, None, updates=5)
    assert {name for name, x in differences.items() if not x <= parity.TOLERANCES[name]} >= {
        "loss",
        "curve",
    }


def test_the_page_has_every_case_and_names_tests_that_are_there():
    page = (Path(__file__).parents[1] / "docs/parity.md").read_text()
    for kind, objective in parity.CASES:
        assert f"| {kind} | {objective} |" in page
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), (file, name)
