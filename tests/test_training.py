"""Whole runs against each other and against loops written in torch.

Runs go through the command line's own functions; only the exports are left out where they are not
the subject.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from easyaira.errors import ConfigError, DataError, NonFiniteError
from easyaira.losses import token_logps
from easyaira.models import attention, splash
from easyaira.models.layers import padded_vocab
from easyaira.train import resolve
from easyaira.train import step as steps
from easyaira.train.setup import prepare
from easyaira.train.step import State
from helpers import tiny
from helpers.loops import torch_adamw, torch_rate, torch_step
from helpers.runs import STEPS, close, configure, losses_of, result, same_bits, train

# ---------------------------------------------------------------------------------------------
# against torch


def torch_batches(task, model, data, out, **options):
    """The examples of each update as lists of (prompt, answers), from our own data layer."""
    setup = prepare(*configure(task, model, data, out, **options))
    e = setup.batches.examples
    for update in range(STEPS[task]):
        chosen = []
        for i in setup.batches.members(update):
            start, *answers, end = e.bounds[i].tolist()
            edges = [*answers, end]
            parts = [e.tokens[a:b].tolist() for a, b in zip(edges, edges[1:], strict=False)]
            chosen.append((e.tokens[start : answers[0]].tolist(), parts))
        yield chosen


def torch_logps(model, prompt, answer):
    """log p of the tokens of `answer`, by transformers, unpadded, one sequence at a time."""
    ids = torch.tensor([prompt + answer])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]][len(prompt) - 1 :]


@pytest.mark.slow
def test_sft_follows_a_torch_loop(models, tmp_path):
    """Of 20 examples, so that every third update has four instead of eight."""
    kind, data = "gpt2", tmp_path
    tiny.write_rows(data / "sft.jsonl", tiny.sft_rows(20))
    rows, params = train("sft", models / kind, data, tmp_path / "run")
    model = tiny.torch_model(tiny.CONFIGS[kind])
    adamw = torch_adamw(model)
    batches = torch_batches("sft", models / kind, data, tmp_path / "x")
    for step, (chosen, row) in enumerate(zip(batches, rows, strict=True)):
        nll = torch.cat([-torch_logps(model, prompt, answer) for prompt, (answer,) in chosen])
        norm = torch_step(model, adamw, nll.mean(), torch_rate(step))
        assert row["loss"] == pytest.approx(nll.mean().item(), abs=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert row["learning_rate"] == pytest.approx(torch_rate(step), rel=1e-5, abs=1e-12)
    setup = prepare(*configure("sft", models / kind, data, tmp_path / "x"))
    ours = tiny.as_theirs(setup.model, params)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(ours[name], parameter.detach(), atol=1e-3)


@pytest.mark.slow
def test_label_smoothing_follows_a_torch_loop(models, data, tmp_path):
    options = {"sft.label_smoothing": 0.2, "max_steps": 4, "gradient_accumulation_steps": 2}
    args = ("sft", models / "gpt2", data)
    rows, _ = train(*args, tmp_path / "run", **options)
    model = tiny.torch_model(tiny.CONFIGS["gpt2"])
    adamw = torch_adamw(model)
    batches = torch_batches(*args, tmp_path / "x", **options)
    for step, (chosen, row) in enumerate(zip(batches, rows, strict=False)):
        logits, labels = [], []
        for prompt, (answer,) in chosen:
            ids = torch.tensor([prompt + answer])
            logits.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1])
            labels.append(ids[0, len(prompt) :])
        loss = F.cross_entropy(torch.cat(logits), torch.cat(labels), label_smoothing=0.2)
        torch_step(model, adamw, loss, torch_rate(step, 4))
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.slow
def test_dpo_follows_a_torch_loop(models, tmp_path):
    """Of 20 pairs, so that every third update has four instead of eight."""
    kind = "gpt2"
    data = tmp_path
    tiny.write_rows(data / "dpo.jsonl", tiny.dpo_rows(20))
    rows, _ = train("dpo", models / kind, data, tmp_path / "run", **{"dpo.sft_weight": 0.5})
    model, reference = (tiny.torch_model(tiny.CONFIGS[kind]) for _ in range(2))
    adamw = torch_adamw(model)
    batches = torch_batches("dpo", models / kind, data, tmp_path / "x")
    for step, (chosen, row) in enumerate(zip(batches, rows[1:], strict=True)):
        scores = torch.stack(
            [
                torch.stack([torch_logps(model, prompt, a).sum() for a in answers])
                for prompt, answers in chosen
            ]
        )
        with torch.no_grad():
            ref = torch.stack(
                [
                    torch.stack([torch_logps(reference, prompt, a).sum() for a in answers])
                    for prompt, answers in chosen
                ]
            )
        lengths = torch.tensor([len(answers[0]) for _, answers in chosen])
        rewards = 0.1 * (scores - ref)
        margins = rewards[:, 0] - rewards[:, 1]
        loss = (-F.logsigmoid(margins) - 0.5 * scores[:, 0] / lengths).mean()
        torch_step(model, adamw, loss, torch_rate(step))
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert row["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-4)
        assert row["rewards/chosen"] == pytest.approx(rewards[:, 0].mean().item(), abs=1e-4)
        assert row["logps/rejected"] == pytest.approx(scores[:, 1].mean().item(), rel=1e-4)
        accuracy = (margins > 1e-6).float().mean().item()
        if step > 1:  # the first update has rate 0, so before the third all margins are rounding
            assert row["rewards/accuracies"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.slow
def test_losses_without_a_reference_follow_a_torch_loop_and_compute_none(models, data, tmp_path):
    """SimPO with the likelihood of the chosen answers, packed and accumulated."""
    options = {"dpo.loss_type": "[simpo, sft]", "dpo.loss_weights": "[1.0, 0.5]"}
    options |= {"dpo.reference": "none", "dpo.beta": 2.0, "max_steps": 4}
    args = ("dpo", models / "llama", data)
    rows, _ = train(*args, tmp_path / "run", gradient_accumulation_steps=4, **options)
    assert not (tmp_path / "run" / "reference.json").exists() and rows[0]["step"] == 1
    model = tiny.torch_model(tiny.CONFIGS["llama"])
    adamw = torch_adamw(model)
    batches = torch_batches("dpo", models / "llama", data, tmp_path / "x", **options)
    for step, (pairs, row) in enumerate(zip(batches, rows, strict=False)):
        means = torch.stack(
            [
                torch.stack([torch_logps(model, prompt, a).mean() for a in answers])
                for prompt, answers in pairs
            ]
        )
        rewards = 2.0 * means
        margins = rewards[:, 0] - rewards[:, 1]
        loss = (-F.logsigmoid(margins - 0.5) - 0.5 * means[:, 0]).mean()
        torch_step(model, adamw, loss, torch_rate(step, 4))
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert row["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-4)
        assert row["nll_loss"] == pytest.approx(-means[:, 0].mean().item(), abs=1e-4)


@pytest.mark.slow
def test_ld_dpo_follows_a_torch_loop(models, data, tmp_path):
    """Packed, accumulated and with shared prompts; tokens beyond the shorter answer weigh 0.3."""
    options = {"dpo.ld_alpha": 0.3, "max_steps": 4, "data.share_prompt": "always"}
    options["gradient_accumulation_steps"] = 4
    args = ("dpo", models / "gpt2", data)
    rows, _ = train(*args, tmp_path / "run", **options)
    model, reference = (tiny.torch_model(tiny.CONFIGS["gpt2"]) for _ in range(2))
    adamw = torch_adamw(model)

    def scores(model, prompt, answers):
        shared = min(map(len, answers))
        logps = [torch_logps(model, prompt, answer) for answer in answers]
        return torch.stack([x[:shared].sum() + 0.3 * x[shared:].sum() for x in logps])

    batches = torch_batches(*args, tmp_path / "x", **options)
    for step, (pairs, row) in enumerate(zip(batches, rows[1:], strict=False)):
        with torch.no_grad():
            ref = torch.stack([scores(reference, *pair) for pair in pairs])
        rewards = 0.1 * (torch.stack([scores(model, *pair) for pair in pairs]) - ref)
        margins = rewards[:, 0] - rewards[:, 1]
        loss = -F.logsigmoid(margins).mean()
        torch_step(model, adamw, loss, torch_rate(step, 4))
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert row["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-4)


@pytest.mark.slow
def test_weighted_pairs_follow_a_torch_loop(models, tmp_path):
    """WPO with margins and weights of the rows, some of which have none."""
    tiny.write_rows(tmp_path / "dpo.jsonl", tiny.weighted_rows(40))
    options = {"dpo.use_weighting": True, "dpo.precompute_ref_log_probs": False, "max_steps": 4}
    options["gradient_accumulation_steps"] = 2
    args = ("dpo", models / "gpt2", tmp_path)
    rows, _ = train(*args, tmp_path / "run", **options)
    setup = prepare(*configure(*args, tmp_path / "x", **options))
    model, reference = (tiny.torch_model(tiny.CONFIGS["gpt2"]) for _ in range(2))
    adamw = torch_adamw(model)

    def scores(model, prompt, answers):
        return torch.stack([torch_logps(model, prompt, answer).sum() for answer in answers])

    def probability(prompt, answer):  # aligned: relative to that of a sampled token
        probs = model(input_ids=torch.tensor([prompt + answer])).logits[0].softmax(-1)
        probs = probs[len(prompt) - 1 : -1]
        tokens = probs[torch.arange(len(answer)), torch.tensor(answer)]
        return (tokens / (probs**2).sum(-1)).log().mean().exp()

    batches = torch_batches(*args, tmp_path / "x", **options)
    for step, (pairs, row) in enumerate(zip(batches, rows[1:], strict=False)):
        with torch.no_grad():
            ref = torch.stack([scores(reference, *pair) for pair in pairs])
            weights = torch.stack(
                [probability(p, chosen) * probability(p, other) for p, (chosen, other) in pairs]
            )
        rewards = 0.1 * (torch.stack([scores(model, *pair) for pair in pairs]) - ref)
        members = setup.batches.members(step)
        wanted, own = (
            torch.tensor(values[members])
            for values in (setup.data.train.margins, setup.data.train.weights)
        )
        margins = rewards[:, 0] - rewards[:, 1] - wanted.nan_to_num(0)
        loss = (-F.logsigmoid(margins) * weights * own.nan_to_num(1)).mean()
        torch_step(model, adamw, loss, torch_rate(step, 4))
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
        differences = (rewards[:, 0] - rewards[:, 1]).mean().item()
        assert row["rewards/margins"] == pytest.approx(differences, abs=1e-4)


@pytest.mark.slow
def test_kto_follows_a_torch_loop(models, tmp_path):
    """Of 21 rows in groups of 2, so that one is left out and the last update of an epoch is
    smaller; accumulated and with shared prompts. The reference is another model, or the estimates
    of the KL divergence would be 0 at first."""
    reference = tiny.save(tmp_path / "other", tiny.CONFIGS["gpt2"], std=0.3)
    tiny.write_rows(tmp_path / "dpo.jsonl", tiny.rated_rows(21))
    options = {"dpo.loss_type": "kto", "dpo.kto_group": 2, "dpo.undesirable_weight": 1.5}
    options |= {"max_steps": 4, "model.ref_name_or_path": tmp_path / "other"}
    args = ("dpo", models / "gpt2", tmp_path)
    fast = {"gradient_accumulation_steps": 4, "data.share_prompt": "always"}
    rows, _ = train(*args, tmp_path / "run", **options, **fast)
    setup = prepare(*configure(*args, tmp_path / "x", **options))
    labels = setup.data.train.labels
    model = tiny.torch_model(tiny.CONFIGS["gpt2"])
    adamw = torch_adamw(model)

    def scores(model, prompt, answers):
        return torch.stack([torch_logps(model, prompt, answer).sum() for answer in answers])

    differences = []
    batches = torch_batches(*args, tmp_path / "x", **options)
    for step, (pairs, row) in enumerate(zip(batches, rows[1:], strict=False)):
        with torch.no_grad():
            ref = torch.stack([scores(reference, *pair) for pair in pairs])
        logratios = torch.stack([scores(model, *pair) for pair in pairs]) - ref
        groups = logratios.detach().reshape(-1, 2, 2).mean(1).clamp(min=0)
        own, z = groups.repeat_interleave(2, 0).T  # with the own answers, and with the mismatched
        good = torch.tensor(labels[setup.batches.members(step)]) > 0
        losses = 1 - torch.sigmoid(0.1 * torch.where(good, 1, -1) * (logratios[:, 0] - z))
        loss = (losses * torch.where(good, 1, 1.5)).mean()
        torch_step(model, adamw, loss, torch_rate(step, 4))
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert row["kl"] == pytest.approx(z.mean().item(), abs=1e-4)
        for name, chosen in (("chosen", good), ("rejected", ~good)):
            reward = 0.1 * logratios[chosen, 0].mean().item()
            assert row[f"rewards/{name}"] == pytest.approx(reward, abs=1e-4)
        differences.append((z - own).abs().mean().item())
    assert max(differences) > 0.01


def test_groups_that_a_device_cannot_hold_are_refused(models, tmp_path):
    tiny.write_rows(tmp_path / "dpo.jsonl", tiny.rated_rows(8))
    args = ("dpo", models / "gpt2", tmp_path, tmp_path / "x")
    options = {"dpo.loss_type": "kto", "gradient_accumulation_steps": 2}
    with pytest.raises(
        ConfigError, match="not a multiple of dpo.kto_group 8; use a multiple of 16"
    ):
        prepare(*configure(*args, **options))
    options = {"dpo.loss_type": "kto", "train_batch_size": 16, "dpo.kto_group": 16}
    with pytest.raises(DataError, match="8 rows are fewer than a group of 16"):
        prepare(*configure(*args, **options))


def test_margins_are_refused_where_the_loss_takes_none(models, tmp_path):
    tiny.write_rows(tmp_path / "dpo.jsonl", tiny.weighted_rows(8))
    args = ("dpo", models / "gpt2", tmp_path, tmp_path / "x")
    with pytest.raises(DataError, match="column margin is filled and would not be used"):
        prepare(*configure(*args, **{"dpo.loss_type": "apo_zero"}))


# ---------------------------------------------------------------------------------------------
# the same run in other ways


FEW = {"max_steps": 4, "data.max_dropped": 0.1}


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory):
    """`plain(task)`: what a run is of, its rows and its parameters, without any fast path.

    11 texts or 13 pairs in updates of 8, so that of the 4 micro-batches of every second one, one is
    empty or larger; a pair is dropped, so that numbers of rows and of examples are not the same."""
    root = tmp_path_factory.mktemp("plain")
    pairs = tiny.dpo_rows(18)
    pairs[3]["rejected"] = pairs[3]["chosen"]
    tiny.ground(root, sft=tiny.sft_rows(11), dpo=pairs[:14], held_out=pairs[14:])

    @functools.cache
    def run(task):
        args, options = (task, models / "llama", root), FEW | {"data.packing": False}
        if task == "dpo":
            options |= {"data.eval": root / "held_out.jsonl", "eval_steps": 2}
            options |= {"dpo.precompute_ref_log_probs": False, "data.share_prompt": "never"}
        return args, *train(*args, root / task, **options)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_packed_accumulated_and_checkpointed_runs_are_the_same_run(task, plain, tmp_path):
    """With the last update of an epoch in unequal micro-batches, and with the reference before
    training and in every step."""
    args, rows, params = plain(task)
    options = FEW | {"gradient_accumulation_steps": 4, "model.gradient_checkpointing": "full"}
    if task == "dpo":
        options |= {"data.eval": args[-1] / "held_out.jsonl", "eval_steps": 2}
    other_rows, other = train(*args, tmp_path / "other", **options)
    names = ("loss", "num_tokens", "rewards/margins", "eval_loss", "eval_rewards/margins")
    for a, b in zip(rows, other_rows, strict=True):
        for name in names:
            assert (name in a) == (name in b)
            assert b.get(name, 0) == pytest.approx(a.get(name, 0), abs=1e-5)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4][: 3 * (task == "dpo")]
    close(other, params, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task, kernel", [("sft", "xla"), ("dpo", "splash")])
def test_every_fast_path_at_once_changes_nothing(
    task, kernel, plain, tmp_path, devices, monkeypatch
):
    """Packed, prompts shared, small chunks of logits, blocks of queries or the TPU's kernel
    (interpreted), reference from the cache, eight devices; against none of them."""
    args, rows, params = plain(task)
    for core in ("token_logps", "token_nll"):
        smaller = partial(getattr(token_logps, core), chunk_logits=5 * padded_vocab(tiny.VOCAB))
        monkeypatch.setattr(token_logps, core, smaller)
    monkeypatch.setattr(attention, "BLOCK", 8)
    interpreted = partial(splash._splash_rows, interpret=True)
    monkeypatch.setattr(splash, "_splash_rows", interpreted)
    monkeypatch.setattr(resolve, "KERNELS", {"cpu": (kernel,)})
    devices(8)
    fast = {"data.share_prompt": "always"} if task == "dpo" else {}
    fast |= FEW | {"mesh": "dp=2,fsdp=2,tp=2", "model.attention": kernel}
    other_rows, other = train(*args, tmp_path / "fast", **fast)
    np.testing.assert_allclose(losses_of(other_rows), losses_of(rows), atol=1e-5)
    close(other, params, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", [("gpt2", "float32"), ("llama", "bfloat16")])
def test_before_the_first_update_loss_is_ln_2_and_margins_are_exactly_0(
    kind, dtype, models, data, tmp_path
):
    options = {"model.dtype": dtype, "max_steps": 1, "data.eval": 0.2, "optimizer.warmup_steps": 0}
    rows, _ = train("dpo", models / kind, data, tmp_path, **options)
    assert rows[0]["step"] == 0
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies"):
        assert rows[0][name] == 0
    first = rows[1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6 if dtype == "float32" else 5e-2)


@pytest.mark.slow
def test_another_reference_is_used_and_its_vocabulary_compared(models, data, tmp_path):
    tiny.save(tmp_path / "other", tiny.CONFIGS["llama"])
    options = {
        "model.ref_name_or_path": tmp_path / "other",
        "max_steps": 1,
        "optimizer.warmup_steps": 0,
    }
    rows, _ = train("dpo", models / "gpt2", data, tmp_path / "run", **options)
    assert rows[0]["rewards/margins"] != 0
    tiny.save(tmp_path / "small", tiny.CONFIGS["gpt2"] | {"vocab_size": 290})
    options["model.ref_name_or_path"] = tmp_path / "small"
    with pytest.raises(ConfigError, match="vocabulary has 290 tokens, but the policy's has 300"):
        train("dpo", models / "gpt2", data, tmp_path / "x", **options)


# ---------------------------------------------------------------------------------------------
# numbers that are not finite


@pytest.mark.slow
def test_what_is_not_finite_never_enters_the_parameters(models, data, tmp_path, monkeypatch):
    """The loss of one micro-batch of update 8 is NaN; the state stays as it was before."""
    from easyaira.algorithms import sft

    real = sft.sft

    def poisoned(model, config):
        inner = real(model, config)

        def loss_fn(params, frozen, batch, key):
            sums = inner(params, frozen, batch, key)
            bad = batch["tokens"].sum() == poison
            loss, count = sums["loss"]
            return sums | {"loss": (jnp.where(bad, jnp.nan, loss), count)}

        return loss_fn

    args = ("sft", models / "gpt2", data)
    options = {"gradient_accumulation_steps": 2, "save_steps": 5}
    setup = prepare(*configure(*args, tmp_path / "x", **options))
    at = 7
    poison = int(setup.batches[at].arrays["tokens"][-1].sum())
    monkeypatch.setattr(sft, "sft", poisoned)
    with pytest.raises(NonFiniteError, match=f"update {at + 1}:.*rows .*checkpoint 5") as error:
        train(*args, tmp_path / "run", **options)
    assert error.value.exit_status == 3
    config, algorithm = configure(*args, tmp_path / "run", **options)
    rows, params = result(config, algorithm)
    assert max(row["step"] for row in rows) <= at
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["adamw", "muon", "8bit"])
def test_a_failed_state_stays_as_it_was(name):
    from easyaira.config.algorithms import OptimizerConfig
    from easyaira.train.optimizer import make_optimizer

    def loss_fn(params, frozen, batch, key):
        x = batch["tokens"].sum()
        return {"loss": (params["w"].sum() * jnp.where(x == 3, jnp.nan, 1.0), jnp.float32(1))}

    options = {"state_dtype": "8bit"} if name == "8bit" else {"name": name}
    tx = make_optimizer(OptimizerConfig(**options))
    step = jax.jit(steps.make_train_step(loss_fn, tx))
    params = {"w": jnp.ones(2)}
    state = State(jnp.int32(0), params, tx.init(params), jnp.int32(-1))
    history = [state]
    for value in (1, 2, 3, 4):
        state, sums = step(state, None, {"tokens": jnp.full((1, 1), value)}, None, 0.1)
        history.append(state)
    assert [int(s.failed) for s in history] == [-1, -1, -1, 2, 2]
    same_bits(history[2].params, history[4].params)
    same_bits(history[2].opt_state, history[4].opt_state)
    assert not np.array_equal(history[1].params["w"], history[2].params["w"])


def test_gradients_of_uneven_micro_batches_are_those_of_one_batch():
    """8 learned tokens beside 1: a mean of means would be far off."""
    import optax

    def loss_fn(params, frozen, batch, key):
        mask = batch["tokens"] > 0
        return {"loss": ((params["w"] * batch["tokens"] * mask).sum(), mask.sum())}

    tx = optax.sgd(1.0)
    step = jax.jit(steps.make_train_step(loss_fn, tx))
    tokens = jnp.array([[[1, 2, 3, 4, 5, 6, 7, 8]], [[9, 0, 0, 0, 0, 0, 0, 0]]], jnp.float32)
    results = []
    for batch in (tokens, tokens.reshape(1, 2, 8)):
        params = {"w": jnp.float32(1)}
        state = State(jnp.int32(0), params, tx.init(params), jnp.int32(-1))
        state, sums = step(state, None, {"tokens": batch}, None, 1.0)
        results.append((float(state.params["w"]), float(sums["grad_norm"][0])))
    assert results[0] == pytest.approx(results[1])
    assert results[0][1] == pytest.approx(45 / 9)


def test_the_loss_of_micro_batches_is_traced_once():
    import optax

    traced = []

    def loss_fn(params, frozen, batch, key):
        traced.append(batch)
        return {"loss": (params["w"] * batch["tokens"].sum(), jnp.float32(1))}

    step = jax.jit(steps.make_train_step(loss_fn, optax.sgd(1.0)))
    params = {"w": jnp.float32(0)}
    state = State(jnp.int32(0), params, optax.sgd(1.0).init(params), jnp.int32(-1))
    step(state, None, {"tokens": jnp.zeros((2, 1, 1))}, None, 1.0)
    assert len(traced) == 1


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.slow
def test_every_micro_batch_of_every_update_drops_something_else(parts):
    import optax

    def loss_fn(params, frozen, batch, key):
        return {"loss": (params["w"] * jax.random.normal(key), jnp.float32(1))}

    step = jax.jit(steps.make_train_step(loss_fn, optax.sgd(1.0)))
    params = {"w": jnp.float32(0)}
    state = State(jnp.int32(0), params, optax.sgd(1.0).init(params), jnp.int32(-1))
    batch, key = {"tokens": jnp.zeros((parts, 1, 1))}, jax.random.key(0)
    moves = []
    for _ in range(3):
        before = state.params["w"]
        state, _ = step(state, None, batch, key, 1.0)
        moves.append(float(before - state.params["w"]))
    wanted = [
        np.mean([jax.random.normal(fold(fold(key, i), j)) for j in range(parts)])
        for i in range(3)
        for fold in [jax.random.fold_in]
    ]
    np.testing.assert_allclose(moves, wanted, rtol=1e-5)
    assert len(set(moves)) == 3
