"""On-policy training: formulas, a run's first update, its rewards, and stopping at any point."""

import html
import json
import re
import shutil
import sys
import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira.algorithms import grpo, online_dpo, ppo, rloo, rollouts
from easyaira.algorithms.held_out import HeldOut
from easyaira.algorithms.on_policy import VECTORS, Completions, loss_of, values_of
from easyaira.config.algorithms import OptimizerConfig
from easyaira.config.rl import RLConfig
from easyaira.config.run import DryRun
from easyaira.data.batches import Batches
from easyaira.data.dataset import Question
from easyaira.data.examples import of_tokens
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError, DataError, Preempted, RewardError, WeightsError
from easyaira.losses.completions import completion_places, take
from easyaira.plan import cost
from easyaira.rewards.model import RewardModel
from easyaira.rewards.reward import Reward, function_of, metrics_of
from easyaira.run import report
from easyaira.run.hacking import means
from easyaira.run.run import run
from easyaira.train import critic
from easyaira.train.metrics import averages
from easyaira.train.optimizer import make_optimizer, make_schedule
from easyaira.train.saving import due
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.runs import configure, same_bits, stop_after, train

B, C, K = 6, 5, 3
LENGTHS = np.array([5, 1, 3, 2, 5, 4], np.float32)


def completions(seed=0, **changed):
    """Completions whose ratios are clipped on both sides, with leftovers behind their ends."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.normal(-2, 0.5, (B, C)).astype(np.float32)
        for name in ("logps", "old_logps", "ref_logps")
    }
    mask = np.arange(C) < LENGTHS[:, None]
    advantages = rng.normal(0, 1, B).astype(np.float32)
    mean_length = np.full(B, LENGTHS.mean(), np.float32)
    return Completions(**arrays, mask=mask, advantages=advantages, mean_length=mean_length)


def config_of(**options):
    return RLConfig(reward="x:y", **options)


def loop(c, config):
    """The loss by the formulas of TRL 1.16's _compute_loss, token by token, in float64."""
    low, high = config.clip
    per_token, per_sequence = [], []
    for b in range(B):
        n = int(LENGTHS[b])
        logps, old, ref = (np.float64(x[b, :n]) for x in (c.logps, c.old_logps, c.ref_logps))
        A = float(c.advantages[b])
        ratio = np.exp(logps - old)
        own = [-min(r * A, min(max(r, low), high) * A) for r in ratio]
        kl = np.exp(ref - logps) - (ref - logps) - 1
        per_token.append(np.array(own) + config.beta * kl)
        whole = np.exp((logps - old).sum())
        per_sequence.append(-min(whole * A, min(max(whole, low), high) * A))
    if config.algorithm == "rloo":
        return np.mean(per_sequence)
    if config.loss_type == "grpo":
        return np.mean([tokens.mean() for tokens in per_token])
    total = sum(tokens.sum() for tokens in per_token)
    return total / (B * C if config.loss_type == "dr_grpo" else LENGTHS.sum())


CONFIGS = [
    config_of(algorithm="grpo", beta=0.3, epsilon_high=0.28),
    config_of(algorithm="grpo", beta=0.0),
    config_of(algorithm="grpo", beta=0.3, loss_type="grpo"),
    config_of(algorithm="grpo", beta=0.3, loss_type="dr_grpo"),
    config_of(algorithm="rloo", beta=0.3),
]


TRL = {  # 1.16's losses, by scripts/parity_rl.py
    "grpo-None-0.3": -0.01037585735321045,
    "grpo-None-0.0": -0.08795656263828278,
    "grpo-grpo-0.3": -0.12813033163547516,
    "grpo-dr_grpo-0.3": -0.0028345186728984118,
    "rloo-None-0.3": -0.13769371807575226,
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.algorithm}-{c.loss_type}-{c.beta}")
def test_losses_are_those_of_a_loop_and_of_trl(config):
    objective = rollouts.OBJECTIVES[config.algorithm]
    c = completions()
    sums = objective.loss(jax.tree.map(jnp.asarray, c), config)
    total, count = sums["loss"]
    loss = float(total) / float(count)
    assert loss == pytest.approx(loop(c, config), abs=1e-6)
    wanted = TRL[f"{config.algorithm}-{config.loss_type}-{config.beta}"]
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert float(sums["clip_ratio/low_mean"][0]) > 0 and float(sums["clip_ratio/high_mean"][0]) > 0


def test_online_dpo_is_the_dpo_loss_of_the_better_answer():
    """Guo et al. (2024), eq. 1, by a loop in float64; of equal rewards, the first is chosen."""
    rewards = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
    config = config_of(algorithm="online_dpo", beta=0.3)
    signs = online_dpo.advantages(rewards, 0 * rewards, config)
    assert signs.tolist() == [[-1, 1], [1, -1], [1, -1]]
    c = completions()._replace(advantages=signs.ravel())
    wanted = []
    for pair, better in enumerate((1, 0, 0)):
        h = [
            np.sum(np.float64(c.logps[b, : int(LENGTHS[b])] - c.ref_logps[b, : int(LENGTHS[b])]))
            for b in (2 * pair, 2 * pair + 1)
        ]
        wanted.append(np.log1p(np.exp(-0.3 * (h[better] - h[1 - better]))))
    sums = online_dpo.loss(jax.tree.map(jnp.asarray, c), config)
    assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(np.mean(wanted), abs=1e-6)
    own = sums["rewards/margins"][0] - sums["rewards/chosen"][0] + sums["rewards/rejected"][0]
    assert float(own) == pytest.approx(0, abs=1e-5)


def test_ppo_is_a_loop_over_its_formulas():
    """Rewards per token, advantages (Schulman et al., 2016, eq. 16), whitening over uneven lengths,
    and the clipped losses, token by token in float64."""
    rng = np.random.default_rng(3)
    config = config_of(algorithm="ppo", beta=0.2, gamma=0.9, lam=0.8, vf_coef=0.3)
    mask = np.arange(C) < LENGTHS[:, None]
    scores = rng.normal(size=B)
    kl, values = rng.normal(size=(2, B, C)) * mask
    learned = ppo.targets(scores, kl, values, mask, config)
    raw, returns = [], []
    for b in range(B):
        n = int(LENGTHS[b])
        rewards = [-0.2 * kl[b, t] + (scores[b] if t == n - 1 else 0) for t in range(n)]
        deltas = [
            rewards[t] + 0.9 * (values[b, t + 1] if t + 1 < n else 0) - values[b, t]
            for t in range(n)
        ]
        own = [sum((0.9 * 0.8) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
        raw.append(own)
        returns.append([a + v for a, v in zip(own, values[b], strict=False)])
    everything = np.concatenate(raw)
    spread = np.sqrt(((everything - everything.mean()) ** 2).sum() / (len(everything) - 1) + 1e-6)
    for b in range(B):
        n = int(LENGTHS[b])
        wanted = (np.array(raw[b]) - everything.mean()) / spread
        np.testing.assert_allclose(learned["advantages"][b, :n], wanted, atol=1e-9)
        np.testing.assert_allclose(learned["returns"][b, :n], returns[b], atol=1e-9)
        assert not learned["advantages"][b, n:].any() and not learned["returns"][b, n:].any()
    of_all = np.concatenate(returns)
    assert learned["explained_variance"][0] == pytest.approx(1 - everything.var() / of_all.var())

    c = completions()
    new = values + rng.normal(0, 0.3, (B, C))
    arrays = {"advantages": learned["advantages"], "returns": learned["returns"]}
    arrays |= {"values": new, "old_values": values}
    c = c._replace(**{name: x.astype(np.float32) for name, x in arrays.items()})
    policy, value = [], []
    for b in range(B):
        for t in range(int(LENGTHS[b])):
            A, R, old = learned["advantages"][b, t], learned["returns"][b, t], values[b, t]
            ratio = np.exp(np.float64(c.logps[b, t]) - c.old_logps[b, t])
            policy.append(max(-A * ratio, -A * min(max(ratio, 0.8), 1.2)))
            near = old + min(max(new[b, t] - old, -0.2), 0.2)
            value.append(0.5 * max((new[b, t] - R) ** 2, (near - R) ** 2))
    sums = ppo.loss(jax.tree.map(jnp.asarray, c), config)
    means = {name: float(sums[name][0] / sums[name][1]) for name in sums}
    assert means["policy_loss"] == pytest.approx(np.mean(policy), abs=1e-5)
    assert means["value_loss"] == pytest.approx(np.mean(value), abs=1e-5)
    assert means["loss"] == pytest.approx(np.mean(policy) + 0.3 * np.mean(value), abs=1e-5)


def test_answers_of_a_prompt_stay_together():
    examples = of_tokens([[1, 2]] * 12, [[[i]] for i in range(3, 15)])
    batches = Batches(examples, 4, 2, seed=1, together=2)
    order = np.concatenate([batches.members(n) for n in range(3)])
    assert order.tolist() != list(range(12)) and sorted(order) == list(range(12))
    assert (order[::2] % 2 == 0).all() and (order[1::2] == order[::2] + 1).all()
    for n in range(3):
        micro, place = batches[n].slots.T
        assert (place[::2] + 1 == place[1::2]).all() and (micro[::2] == micro[1::2]).all()


def test_the_gradient_of_rloo_at_ratio_1_is_that_of_its_paper():
    """-advantage x the gradient of the answer's log-probability."""
    c = jax.tree.map(jnp.asarray, completions())
    c = c._replace(old_logps=c.logps)
    config = config_of(algorithm="rloo")

    def total(logps):
        return rloo.loss(c._replace(logps=logps), config)["loss"][0]

    wanted = -c.advantages[:, None] * c.mask
    np.testing.assert_allclose(jax.grad(total)(c.logps), wanted, atol=1e-6)


def test_advantages_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    rewards, kl = rng.normal(size=(4, K)), rng.normal(size=(4, K))
    for scale in ("group", "batch", "none", None):
        advantages = grpo.advantages(rewards, kl, config_of(scale_rewards=scale))
        for p in range(4):
            own = rewards[p]
            spread = {"batch": np.std(rewards, ddof=1) + 1e-4, "none": 1.0}
            spread = spread.get(scale, np.std(own, ddof=1) + 1e-4)
            for k in range(K):
                assert advantages[p, k] == pytest.approx((own[k] - own.mean()) / spread)
    plain = rloo.advantages(rewards, kl, config_of(algorithm="rloo", beta=0.2))
    shaped = rewards - 0.2 * kl
    for p in range(4):
        for k in range(K):
            others = [shaped[p, i] for i in range(K) if i != k]
            assert plain[p, k] == pytest.approx(shaped[p, k] - np.mean(others))
    config = config_of(algorithm="rloo", beta=0.2, normalize_advantages=True)
    scaled = rloo.advantages(rewards, kl, config)
    assert scaled.mean() == pytest.approx(0, abs=1e-9)
    assert scaled.std(ddof=1) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_values_by_completion_are_those_of_their_tokens(packing):
    """In packed rows and with their gradients, for completions of uneven lengths."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 99, n).tolist() for n in (3, 1, 6, 2, 4, 3)]
    answers = [rng.integers(100, 199, int(n)).tolist() for n in LENGTHS]
    examples = of_tokens(prompts, [[answer] for answer in answers])
    batch = Batches(examples, B, packing=packing, length=24)[0]
    rows = {name: jnp.asarray(array[0]) for name, array in batch.arrays.items()}
    order = np.argsort(batch.slots[:, 1])
    prompt_lengths = jnp.float32([len(prompts[i]) for i in batch.examples[order]])
    tokens = jnp.float32(rows["tokens"])
    weights = jnp.asarray(rng.normal(size=(B, C)).astype(np.float32))

    def total(values):
        return (take(values, completion_places(rows, prompt_lengths[:, None], C)) * weights).sum()

    taken = take(tokens, completion_places(rows, prompt_lengths[:, None], C))
    gradient = jax.grad(total)(tokens)
    for b, i in enumerate(batch.examples[order]):
        assert taken[b].tolist() == answers[i] + [0] * (C - len(answers[i]))
        own = np.asarray(gradient)[np.asarray((rows["segment_ids"] == b + 1) & rows["loss_mask"])]
        np.testing.assert_array_equal(own, weights[b, : len(answers[i])])
    assert not np.asarray(gradient)[~np.asarray(rows["loss_mask"])].any()


def test_a_save_is_put_off_to_the_end_of_a_cycle():
    assert [n for n in range(1, 13) if due(n, 4, 13, 3)] == [6, 9, 12]
    assert [n for n in range(1, 13) if due(n, 4, 13)] == [4, 8, 12]


# Runs

FUNCTIONS = """
import json
import os

def count(prompts, completions):
    return [float(text.count("e")) for text in completions]

def length(prompts, completions):
    return [0.0 for _ in completions][1:]

def nan(prompts, completions):
    return [float("nan") for _ in completions]

def words(prompts, completions):
    return ["good" for _ in completions]

def by_number(prompts, completions):
    return {i: float(text.count("e")) for i, text in enumerate(completions)}

def fails(prompts, completions):
    raise KeyError("score")

def leaves(prompts, completions):
    raise SystemExit(3)

def compares(prompts, completions, answer):
    return [float(a == b) for a, b in zip(completions, answer)]

def kept(prompts, completions):
    with open(__file__ + ".held_out", "a") as file:
        file.write(json.dumps([prompts, completions]) + "\\n")
    return [float(len(text)) for text in completions]

seen = []

def late_held_out(prompts, completions):
    seen.append(1)
    if len(seen) == 2 and not os.path.exists(__file__ + ".mended"):
        return nan(prompts, completions)
    return kept(prompts, completions)

calls = []

def late(prompts, completions):
    calls.append(1)
    return nan(prompts, completions) if len(calls) == 3 else count(prompts, completions)
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("ground")
    prompts = [{"prompt": f"what do you like {i}?"} for i in range(10)]
    models = {"gpt2": tiny.CONFIGS["gpt2"], "bert": tiny.SCORERS["bert"]}
    models["judge"] = tiny.scorer(tiny.CONFIGS["gpt2"])
    tiny.ground(root, models, rl=prompts)
    (root / "reward.py").write_text(FUNCTIONS)
    return root


def options_of(ground, **options):
    return {
        "rl.reward": f"{ground / 'reward.py'}:count",
        "rl.max_completion_length": 10,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 0,
        **(
            {}
            if options.get("rl.algorithm") in ("online_dpo", "ppo")
            else {"rl.num_generations": 4}
        ),
        **options,
    }


def logged(rows):
    timing = ("tokens_per_second", "step_time", "mfu", "data_wait", "cpu_time", "compilations")
    return [{name: value for name, value in row.items() if name not in timing} for row in rows]


def trained(ground, folder, **options):
    return train("rl", ground / "gpt2", ground, folder, **options_of(ground, **options))


CYCLES = {  # two rollouts and a half, of two updates each
    "grpo": {"rl.num_iterations": 2, "gradient_accumulation_steps": 2},
    "rloo": {"rl.algorithm": "rloo", "rl.num_iterations": 2, "optimizer.name": "muon"},
    "ppo": {
        "rl.algorithm": "ppo",
        "rl.num_generations": 2,
        "rl.num_iterations": 2,
        "export": True,
    },
    "online_dpo": {"rl.algorithm": "online_dpo", "rl.generation_batch_size": 16},
}
SHARED = {"max_steps": 5, "data.share_prompt": "always"}
CYCLES = {name: SHARED | options for name, options in CYCLES.items()}


@pytest.fixture(scope="module")
def through(ground, tmp_path_factory):
    """Uninterrupted runs: name -> (folder, rows, parameters)."""
    root = tmp_path_factory.mktemp("through")

    class Runs(dict):
        def __missing__(self, name):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
                self[name] = root / name, *trained(ground, root / name, **CYCLES[name])
            return self[name]

    return Runs()


def test_the_first_update_of_a_roll_out_has_the_bits_of_its_log_probabilities(ground):
    """Whatever program computed them; here, they are far from the policy's."""
    model, params = tiny.load(ground / "gpt2")
    config = config_of(algorithm="grpo", beta=1.0, max_completion_length=C)
    loss_fn = loss_of(model, config, rollouts.OBJECTIVES["grpo"])
    examples = of_tokens([[5, 6, 7]] * B, [[list(range(9, 9 + int(n)))] for n in LENGTHS])
    old = completions().old_logps * (np.arange(C) < LENGTHS[:, None])
    known = {name: np.zeros(B, np.float32) for name in VECTORS}
    known |= {"old_logps": old, "ref_logps": old, "lengths": LENGTHS}
    known |= {"prompt_lengths": np.full(B, 3, np.float32), "advantages": completions().advantages}
    known["mean_length"] = np.full(B, LENGTHS.mean(), np.float32)
    for first in (1, 0):
        known["first"] = np.full(B, first, np.float32)
        by_example = {name: values[:, None] for name, values in known.items()}
        batch = Batches(examples, B, known=by_example, length=16)[0]
        rows = {name: jnp.asarray(array[0]) for name, array in batch.arrays.items()}
        sums = jax.jit(loss_fn)(params, None, rows, None)
        assert (sums["kl"][0] == 0) == first
        total = -(completions().advantages * LENGTHS).sum()
        assert (float(sums["loss"][0]) == pytest.approx(total, abs=1e-5)) == first
        assert (sums["clip_ratio/region_mean"][0] == 0) == first


@pytest.mark.slow
@pytest.mark.parametrize("algorithm, together", [("grpo", 3), ("rloo", 6), ("online_dpo", 2)])
def test_completions_that_share_their_prompt_equal_separate_rows(algorithm, together, ground):
    """Loss, metrics and gradients."""
    model, params = tiny.load(ground / "gpt2")
    config = config_of(algorithm=algorithm, beta=0.3, max_completion_length=C)
    loss_fn = loss_of(model, config, rollouts.OBJECTIVES[algorithm])
    rng = np.random.default_rng(5)
    prompts = [rng.integers(2, 99, 4 + i // together).tolist() for i in range(B)]
    prompts = [prompts[i // together * together] for i in range(B)]
    answers = [rng.integers(100, 199, int(n)).tolist() for n in LENGTHS]
    mask = np.arange(C) < LENGTHS[:, None]
    known = {name: np.zeros(B, np.float32) for name in VECTORS}
    known |= {"old_logps": -5 * mask, "ref_logps": -rng.uniform(4, 6, (B, C)) * mask}
    known |= {"lengths": LENGTHS, "advantages": np.sign(rng.normal(size=B))}
    known |= {"prompt_lengths": [len(prompt) for prompt in prompts], "mean_length": [3] * B}
    known = {name: np.asarray(values, np.float32) for name, values in known.items()}

    def measure(n, **layout):
        own = [answers[i : i + n] for i in range(0, B, n)]
        grouped = {name: x.reshape(-1, n, *x.shape[1:]) for name, x in known.items()}
        examples = of_tokens(prompts[::n], own)
        batch = Batches(examples, B // n, known=grouped, **layout)[0]
        rows = {name: jnp.asarray(array[0]) for name, array in batch.arrays.items()}

        def total(params):
            sums = loss_fn(params, None, rows, None)
            return sums["loss"][0], sums

        (_, sums), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return sums, grads, batch.filled

    sums, grads, filled = measure(1, packing=False)
    for share in (True, False) if algorithm == "grpo" else (True,):
        other_sums, other_grads, other_filled = measure(together, share_prompt=share)
        assert (other_filled < filled) == share
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
        for one, other in zip(*map(jax.tree.leaves, (grads, other_grads)), strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * largest)
        for name, value in sums.items():
            np.testing.assert_allclose(other_sums[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CYCLES)
def test_ratios_are_1_and_the_divergence_is_0_at_the_first_update(name, through):
    _, rows, _ = through[name]
    first, second = rows[0], rows[1]
    assert first["kl"] == first["objective/kl"] == 0
    if name == "online_dpo":
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    else:
        assert first["clip_ratio/region_mean"] == 0
    # the second update is of the same rollout, whose divergence was taken when it was sampled
    assert (second["kl"] == 0) == (name != "grpo")
    assert rows[2]["objective/kl"] != 0 and rows[2]["entropy"] > 0
    assert 0 < first["completions/mean_length"] <= 10
    assert 0 <= first["completions/clipped_ratio"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CYCLES)
def test_answers_and_rewards_are_kept_for_people(name, through):
    folder, rows, _ = through[name]
    shown = rollouts.read(folder / rollouts.COMPLETIONS)
    assert sorted({row["update"] for row in shown}) == [0, 2, 4]
    for row in shown:
        assert row["reward"] == row["completion"].count("e")
    page = (folder / "report.html").read_text()
    assert "Answers in training and their rewards" in page
    assert html.escape(shown[-1]["prompt"]) in page
    drawn = {name for _, names in report.PANELS for name in names}
    assert {"reward", "objective/kl", "entropy"} <= drawn & set(rows[0])
    assert ("clip_ratio/region_mean" in rows[0]) == (name != "online_dpo")
    assert {"completions/mean_length", "completions/clipped_ratio"} <= drawn & set(rows[0])


@pytest.mark.slow
@pytest.mark.parametrize("name, stop", [("grpo", 1), ("rloo", 4), ("online_dpo", 3), ("ppo", 3)])
def test_a_run_stopped_anywhere_in_a_cycle_is_the_same_run(
    name, stop, ground, through, tmp_path, monkeypatch
):
    """It ends after the rollout's last update, since only there is nothing of it needed."""
    _, rows, params = through[name]
    ends = stop + stop % 2
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Preempted, match=f"SIGTERM after update {ends} of"):
            trained(ground, tmp_path / "run", **CYCLES[name])
    resumed_rows, resumed = trained(ground, tmp_path / "run", **CYCLES[name])
    same_bits(resumed, params)
    assert logged(resumed_rows) == logged(rows)
    folder = through[name][0]
    same = [(f / rollouts.COMPLETIONS).read_text() for f in (folder, tmp_path / "run")]
    assert same[0] == same[1]


def same_roll_out(name, through, folder, rows):
    """Texts and two updates of the first rollout. AdamW makes other texts of its rounding in the
    next one: its first steps are as large for gradients near 0."""
    wanted_folder, wanted_rows, _ = through[name]
    texts = [rollouts.read(f / rollouts.COMPLETIONS) for f in (folder, wanted_folder)]
    assert texts[0] == texts[1][: len(texts[0])] and len(rows) == 2
    for row, wanted in zip(rows, wanted_rows, strict=False):
        for metric in ("loss", "reward", "objective/kl", "entropy", "grad_norm", "value_loss"):
            assert row.get(metric, 0) == pytest.approx(wanted.get(metric, 0), abs=1e-5), metric


@pytest.mark.slow
@pytest.mark.parametrize("name", CYCLES)
def test_a_run_whose_answers_share_their_prompt_is_the_same_run(name, ground, through, tmp_path):
    """As one with separate rows, which are neither packed nor accumulated."""
    apart = {"data.share_prompt": "never", "data.packing": False, "gradient_accumulation_steps": 1}
    options = CYCLES[name] | apart | {"max_steps": 2, "export": False}
    rows, _ = trained(ground, tmp_path / "apart", **options)
    same_roll_out(name, through, tmp_path / "apart", rows)
    args = ("rl", ground / "gpt2", ground, tmp_path / "x")
    plans = [
        prepare(*configure(*args, **options_of(ground, **own))) for own in (CYCLES[name], options)
    ]
    sizes = [plan.batches.examples.answers for plan in plans]
    assert sizes == [2 if name in ("ppo", "online_dpo") else 4, 1]


@pytest.mark.slow
def test_eight_devices_are_the_run_of_one(ground, through, devices, tmp_path):
    """Policy, value model, reference and sampler on a mesh, through a rollout."""
    devices(8)
    options = CYCLES["ppo"] | {"mesh": "fsdp=4,tp=2", "max_steps": 2, "export": False}
    rows, _ = trained(ground, tmp_path / "run", **options)
    same_roll_out("ppo", through, tmp_path / "run", rows)


@pytest.mark.slow
def test_a_run_stopped_in_a_roll_out_is_the_same_run(ground, through, tmp_path, monkeypatch):
    _, rows, params = through["grpo"]
    # two rollouts of four prompts with four answers are 32 answers; the next one is interrupted
    with monkeypatch.context() as patch:
        stop_after(patch, 2, rollouts.Rollouts, "roll_out")
        with pytest.raises(Preempted, match="SIGTERM after update 2 of"):
            trained(ground, tmp_path / "run", **CYCLES["grpo"])
    resumed_rows, resumed = trained(ground, tmp_path / "run", **CYCLES["grpo"])
    same_bits(resumed, params)
    assert logged(resumed_rows) == logged(rows)


@pytest.mark.slow
def test_the_value_model_is_released_as_a_token_classifier(through):
    folder = through["ppo"][0] / "value"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForTokenClassification"]
    assert config["id2label"] == {"0": "value"}
    logits = json.loads((folder / "export_report.json").read_text())["logits"]
    assert logits["compared"] and logits["max_difference"] <= logits["tolerance"]
    assert (through["ppo"][0] / "hf" / "proof.json").exists()


@pytest.mark.slow
def test_the_value_model_starts_from_the_reward_model(ground, tmp_path):
    """At the last token of a text, its value is the text's score."""
    tiny.save(tmp_path / "judge", tiny.SCORERS["gpt2"])
    options = {"rl.algorithm": "ppo", "rl.num_generations": 1, "rl.value_model": tmp_path / "judge"}
    args = ("rl", ground / "gpt2", ground, tmp_path / "run")
    setup = prepare(*configure(*args, **options_of(ground, **options)))
    with setup.model.on(setup.mesh):
        params = setup.trainable.start()
    tokens = jnp.array([[5, 6, 7, 8]])
    rows = {"tokens": tokens, "positions": jnp.arange(4)[None], "sides": 0 * tokens}
    rows["segment_ids"] = jnp.ones_like(tokens)
    values, _ = setup.trainable.value.score(params["value"], rows, examples=1, answers=1)
    judge = setup.critic.scorer
    weights = setup.critic.origin.load(judge, setup.mesh)
    score, _ = judge.score(weights, rows, examples=1, answers=1)
    assert float(values[0, -1]) == pytest.approx(float(score[0, 0]), abs=1e-5)
    config = config_of(algorithm="ppo", max_completion_length=C)
    rows |= {"loss_mask": jnp.array([[False, False, True, True]])}
    rows |= {"prompt_lengths": jnp.array([[2.0]])}
    before = values_of(setup.trainable.value, params["value"], rows, config)
    np.testing.assert_allclose(before[0], [values[0, 1], values[0, 2], 0, 0, 0], atol=1e-6)


def test_an_update_costs_the_products_of_policy_and_value_model(ground, tmp_path):
    """Six operations per weight and token; no layer of a GPT-2 but the embeddings is free."""
    config = tiny.CONFIGS["gpt2"]
    D, layers, vocab = config["n_embd"], config["n_layer"], config["vocab_size"]
    body = layers * (12 * D * D + 13 * D) + 2 * D  # kernels, biases and norms
    positions = config["n_positions"] * D
    for algorithm, value in {"grpo": 0, "ppo": body + D + 1}.items():
        options = options_of(ground, **{"rl.algorithm": algorithm})
        args = ("rl", ground / "gpt2", ground, tmp_path / algorithm)
        setup = prepare(*configure(*args, **options))
        policy = vocab * D + positions + body  # the tied embedding is the head
        assert cost.flops_of(setup, False) == 6 * (policy + value)


@pytest.mark.parametrize("clip, name", [(0.0, "adamw"), (0.1, "adamw"), (0.1, "muon")])
def test_policy_and_value_model_have_optimizers_of_their_own(clip, name):
    options = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=clip)
    both = critic.make_optimizer(options, 3e-2)
    alone = {"policy": options, "value": replace(options, learning_rate=3e-2)}
    rng = np.random.default_rng(0)
    params = {name: {"kernel": rng.normal(size=(1, 2, 3)).astype(np.float32)} for name in alone}
    grads = jax.tree.map(lambda x: x * 5 + 1, params)
    state = both.init(params)
    states, own = {}, {}
    for name, config in alone.items():
        own[name] = make_optimizer(config)
        states[name] = own[name].init(params[name])
    for step in range(3):
        rates = {name: make_schedule(config, 10)(step) for name, config in alone.items()}
        updates, state = both.update(grads, state, params, learning_rate=rates["policy"])
        for name, rate in rates.items():
            args = (grads[name], states[name], params[name])
            wanted, states[name] = own[name].update(*args, learning_rate=rate)
            np.testing.assert_allclose(updates[name]["kernel"], wanted["kernel"], rtol=1e-5)


@pytest.mark.slow
def test_adapters_learn_with_their_base_as_the_reference(ground, tmp_path):
    """With magnitudes and a whole table, beside a value model."""
    lora = {"lora.r": 4, "lora.alpha": 8, "lora.target_modules": "[c_attn, c_proj, c_fc]"}
    lora |= {"lora.dora": True, "lora.modules_to_save": "[wte]"}
    options = CYCLES["ppo"] | lora | {"max_steps": 3, "export": False}
    rows, _ = trained(ground, tmp_path / "run", **options)
    assert rows[0]["objective/kl"] == rows[0]["kl"] == 0 and rows[2]["objective/kl"] != 0
    assert rows[0]["clip_ratio/region_mean"] == 0 < rows[0]["value_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "eval_reward"])
def test_a_reward_model_that_was_replaced_is_refused(name, ground, tmp_path):
    judge = shutil.copytree(ground / "bert", tmp_path / "judge")
    options = {
        f"rl.{name}": f"[{ground / 'reward.py'}:count, {judge}]",
        "max_steps": 1,
        "data.eval": 2,
    }
    trained(ground, tmp_path / "run", **options)
    trained(ground, tmp_path / "run", **options)  # the same one
    tiny.save(judge, tiny.SCORERS["bert"], std=0.19)
    with pytest.raises(ConfigError, match=f"^rl.{name}: .*judge'] has other weights than when the"):
        trained(ground, tmp_path / "run", **options)


@pytest.mark.slow
def test_reward_models_and_functions_add_up(ground, tmp_path):
    """In rollouts of a single answer, whose reward has no spread."""
    count = f"{ground / 'reward.py'}:count"
    options = {"rl.reward": f"[{count}, {ground / 'bert'}]", "rl.reward_weights": "[2, 10]"}
    options |= {"rl.algorithm": "ppo", "train_batch_size": 1, "max_steps": 4}
    options |= {"rl.missing_eos_penalty": 3.0}
    rows, _ = trained(ground, tmp_path / "run", **options)
    shown = rollouts.read(tmp_path / "run" / rollouts.COMPLETIONS)
    conversations = [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        for row in shown
    ]
    scores = (
        RewardModel(str(ground / "bert"), meshes.make_mesh("fsdp=-1"))
        .load()
        .of_answers(conversations)
    )
    assert len(shown) == 4
    for answer, score, row in zip(shown, scores, rows, strict=True):
        wanted = 2 * answer["completion"].count("e") + 10 * score
        assert answer["reward"] == pytest.approx(wanted, rel=1e-4)
        wanted = answer["reward"] - 3 * row["completions/clipped_ratio"]
        assert row["reward"] == pytest.approx(wanted, rel=1e-5) and row["reward_std"] == 0


# Bad input


@pytest.mark.parametrize(
    "function, problem",
    [
        ("length", "length gave 7 numbers for 8 answers; fix the reward and"),
        ("nan", "nan gave nan for the answer"),
        ("words", "words gave ['good', "),
        ("by_number", "by_number gave {0: "),
        ("fails", "fails raised KeyError: 'score' (GROUND/reward.py:21)"),
        ("leaves", "leaves raised SystemExit: 3 (GROUND/reward.py:24)"),
    ],
)
def test_a_bad_reward_is_one_line(function, problem, ground, tmp_path):
    reward = {"rl.reward": f"{ground / 'reward.py'}:{function}"}
    with pytest.raises(RewardError) as error:
        trained(ground, tmp_path / "run", max_steps=2, **reward)
    assert problem.replace("GROUND", str(ground)) in str(error.value)
    assert error.value.exit_status == 2


@pytest.mark.slow
def test_a_bad_reward_loses_no_update(ground, tmp_path):
    late = {"rl.reward": f"{ground / 'reward.py'}:late", "max_steps": 4}
    with pytest.raises(RewardError):
        trained(ground, tmp_path / "run", **late)
    rows, params = trained(ground, tmp_path / "run", **late)  # the module is read again
    whole_rows, whole = trained(ground, tmp_path / "whole", max_steps=4)
    same_bits(params, whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["reward"] for row in rows] == [row["reward"] for row in whole_rows]


HELD_OUT = CYCLES["grpo"] | {"max_steps": 4, "data.eval": 3, "eval_steps": 1}


@pytest.fixture(scope="module")
def measured(ground, tmp_path_factory):
    """Of a run that answers held-out prompts: folder, options, rows, parameters and what its second
    reward was asked."""
    root, kept = tmp_path_factory.mktemp("measured"), ground / "reward.py.held_out"
    options = HELD_OUT | {"rl.eval_reward": f"{ground / 'reward.py'}:kept"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
        kept.unlink(missing_ok=True)
        rows, params = trained(ground, root / "run", **options)
    asked = [json.loads(line) for line in kept.read_text().splitlines()]
    return root / "run", options, rows, params, asked


@pytest.mark.parametrize("source", ["share", "file"])
def test_the_held_out_reward_gets_the_prompts_that_are_answered(source, ground, tmp_path):
    other = tiny.write_rows(tmp_path / "other.jsonl", [{"prompt": f"why {i}?"} for i in range(4)])
    options = options_of(ground, **{"data.eval": 0.3 if source == "share" else other})
    args = ("rl", ground / "gpt2", ground, tmp_path / "run")
    setup = prepare(*configure(*args, **options))
    reward = Reward(setup.config.rl.rewards, None, setup.mesh, "float32")
    held_out = HeldOut(setup, rollouts.make_sampler(setup), reward)
    asked = [question.messages[0]["content"] for question in held_out.questions]
    assert asked == [setup.template.text(tokens) for tokens in held_out.prompts]
    assert len(asked) == {"share": 3, "file": 4}[source] and held_out.reward is reward
    assert setup.held_out is None  # nothing to compute a loss of


@pytest.mark.slow
def test_a_run_stopped_while_held_out_prompts_are_answered_is_the_same_run(
    ground, measured, tmp_path, monkeypatch
):
    _, options, rows, params, _ = measured
    with monkeypatch.context() as patch:  # at the evaluation after update 2
        stop_after(patch, 2, HeldOut, "__call__")
        with pytest.raises(Preempted):
            trained(ground, tmp_path / "run", **options)
    resumed_rows, resumed = trained(ground, tmp_path / "run", **options)
    same_bits(resumed, params)
    assert logged(resumed_rows) == logged(rows)


@pytest.mark.slow
def test_held_out_prompts_are_answered_between_roll_outs(ground, measured, tmp_path):
    """By a reward of their own, and without a trace in the training."""
    folder, _, rows, params, answered = measured
    rewards = {row["step"]: row["eval_reward"] for row in rows if "eval_reward" in row}
    assert list(rewards) == [0, 2, 4] and len(answered) == 3
    for reward, (prompts, answers) in zip(rewards.values(), answered, strict=True):
        assert reward == pytest.approx(np.mean([len(text) for text in answers]))
        assert len(prompts) == 3 and prompts == answered[0][0]
    trained_on = {row["prompt"] for row in rollouts.read(folder / rollouts.COMPLETIONS)}
    assert not trained_on & {*answered[0][0]}
    rows, plain = trained(ground, tmp_path / "plain", **HELD_OUT | {"eval_steps": 0})
    same_bits(params, plain)
    assert rows[0]["eval_reward"] != rewards[0]  # of the reward that is trained on


@pytest.mark.slow
def test_a_last_evaluation_that_failed_is_made_by_the_next_command(ground, tmp_path):
    """A run without a release was called finished."""
    late = {"rl.eval_reward": f"{ground / 'reward.py'}:late_held_out", "max_steps": 2}
    late |= {"data.eval": 3, "eval_steps": 2}
    with pytest.raises(RewardError):
        trained(ground, tmp_path / "run", **late)
    (ground / "reward.py.mended").touch()
    for _ in range(2):  # the second time, nothing is left to do
        rows, _ = trained(ground, tmp_path / "run", **late)
        assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2]
    (ground / "reward.py.mended").unlink()


@pytest.mark.slow
def test_a_bad_held_out_reward_loses_no_update(ground, measured, tmp_path):
    late = HELD_OUT | {"rl.eval_reward": f"{ground / 'reward.py'}:late_held_out"}
    with pytest.raises(RewardError):
        trained(ground, tmp_path / "run", **late)  # at the evaluation after update 2
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    (ground / "reward.py.mended").touch()
    rows, params = trained(ground, tmp_path / "run", **late)
    same_bits(params, measured[3])
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 4]


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"rl.num_generations": 1}, "rl.num_generations: 1 answer has none"),
        ({"rl.reward": "[]"}, "rl.reward: is empty; name a reward model or file.py:function"),
        ({"rl.eval_reward": "[]"}, "rl.eval_reward: is empty"),
        (
            {"rl.reward": "GROUND/reward.py:compares"},
            "compares: missing a required argument: 'answer'; a fun",
        ),
        ({"rl.num_generations": 3}, "rl.num_generations: the 8 answers of a rollout are not a mul"),
        ({"rl.generation_batch_size": 12}, "rollout are not a multiple of train_batch_size 8"),
        ({"rl.reward": "r.py"}, "rl.reward: r.py is a file; name a function in it as r.py:NAME"),
        ({"rl.reward_weights": "[1, 2]"}, "2 weights for 1 rewards"),
        ({"rl.algorithm": "rloo", "rl.loss_type": "dapo"}, "rl.loss_type: applies to grpo only"),
        ({"rl.normalize_advantages": True}, "applies to rloo only"),
        ({"rl.gamma": 0.9}, "rl.gamma: applies to ppo only"),
        ({"rl.algorithm": "online_dpo", "rl.num_generations": 4}, "online_dpo compares 2 answers"),
        ({"rl.value_model": "x"}, "rl.value_model: applies to ppo only"),
        ({"rl.algorithm": "ppo", "rl.value_model": "GROUND/bert"}, "bert is an encoder"),
        ({"rl.algorithm": "ppo", "rl.value_model": "GROUND/gpt2"}, "gpt2 has no score/"),
        ({"rl.algorithm": "online_dpo", "rl.beta": 0.0}, "rl.beta: without it online_dpo"),
        (
            {"rl.algorithm": "online_dpo", "train_batch_size": 2, "gradient_accumulation_steps": 2},
            "online_dpo needs pairs",
        ),
        ({"rl.eval_reward": "none.py:f"}, "rl.eval_reward: there are no held-out prompts"),
        ({"rl.eval_reward": "none.py:f", "data.eval": 2}, "none.py cannot be imported"),
        ({"model.dropout": 0.1}, "set it to 0 for on-policy training"),
        ({"rl.max_completion_length": 64}, "64 leaves no room for a prompt in 64 positions"),
        ({"train_batch_size": 64}, "10 prompts are fewer than the 16 of a rollout"),
        ({"rl.reward": "none.py:f"}, "none.py cannot be imported: FileNotFoundError"),
        ({"rl.reward": "GROUND/gpt2"}, "gpt2: is not a reward model, as it has no score/linear"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, problem, ground, tmp_path):
    options = {name: str(value).replace("GROUND", str(ground)) for name, value in options.items()}
    with pytest.raises(ConfigError) as error:
        config = configure(
            "rl", ground / "gpt2", ground, tmp_path / "run", **options_of(ground, **options)
        )
        prepare(*config)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "name, problem",
    [
        ("nothing.py:f", "nothing.py cannot be imported: FileNotFoundError"),
        ("no.such.module:f", "no.such.module cannot be imported: ModuleNotFoundError"),
        ("easyaira.rewards.rules:f", "easyaira.rewards.rules has no function 'f'"),
    ],
)
def test_a_missing_reward_function_is_one_line(name, problem):
    with pytest.raises(ConfigError, match="rl.reward: ") as error:
        function_of(name)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_a_reward_may_hold_a_dataclass_and_be_called_like_a_library(tmp_path):
    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Rule:\n"
        "    worth: int = 3\n"
        "def reward(completions, **_):\n"
        "    return [Rule().worth for _ in completions]\n"
    )
    assert function_of(f"{tmp_path / 'json.py'}:reward")(completions=["a", "b"]) == [3, 3]
    assert sys.modules["json"] is json


def test_a_reward_may_import_a_file_beside_it(tmp_path, monkeypatch):
    """And a module of the current folder is one, also for the installed command."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/part_of_reward.py").write_text("WORTH = 4\n")
    code = "from part_of_reward import WORTH\ndef f(completions):\n    return [WORTH]\n"
    (tmp_path / "parts/own_reward.py").write_text(code)
    assert function_of(f"{tmp_path / 'parts/own_reward.py'}:f")([""]) == [4]
    (tmp_path / "reward_of_folder.py").write_text("def f(completions):\n    return [5]\n")
    monkeypatch.chdir(tmp_path)
    assert function_of("reward_of_folder:f")([""]) == [5]


@pytest.mark.parametrize(
    "arguments",
    [
        "p, c",
        "p, c, gold",
        "gold, c",  # the first two, whatever they are called
        "prompts, completions",
        "completions, prompts",
        "gold, completions",
        "completions, absent=None, **others",
        "completions, *, prompts",
    ],
)
def test_a_function_gets_its_arguments_by_name(arguments, tmp_path):
    """In any order, as TRL calls it; those of other names get prompts, then completions."""
    source = f"""
        def f({arguments}):
            texts = locals().get("c") or completions
            prompts_ = locals().get("prompts") or locals().get("p") or ["four"] * len(texts)
            if "others" in locals():
                assert set(others) == {{"prompts", "gold"}} and absent is None
            elif "gold" in locals() and "{arguments}" != "gold, c":
                assert gold == [7, None]
            assert list(prompts_) == ["four"] * len(texts)
            return [float(len(text)) for text in texts]
        """
    (tmp_path / "own.py").write_text(textwrap.dedent(source))
    own = [f"{tmp_path / 'own.py'}:f"]
    reward = Reward(own, [0.5], meshes.make_mesh("fsdp=1"), "float32", lambda: ["prompt", "gold"])
    assert reward.takes("gold") == ("gold" in arguments or "**" in arguments)
    messages = [{"role": "user", "content": "four"}]
    asked = [Question(messages, {"gold": gold}) for gold in (7, None)]
    each = reward(asked, ["a", "bc"])
    assert each.tolist() == [[1.0, 2.0]] and reward.total(each).tolist() == [0.5, 1.0]


def test_none_is_no_reward(tmp_path):
    """It adds nothing to the other rewards, as in TRL 1.16; an answer needs one of them."""
    (tmp_path / "own.py").write_text(
        "def first(completions):\n"
        "    return (1 if 'a' in text else None for text in completions)\n"
        "def second(completions):\n"
        "    return [2 if 'b' in text else None for text in completions]\n"
    )
    own = [f"{tmp_path / 'own.py'}:{name}" for name in ("first", "second")]
    reward = Reward(own, [0.5, 10], meshes.make_mesh("fsdp=1"), "float32")
    asked = [Question([{"role": "user", "content": "four"}], {})] * 3
    each = reward(asked, ["a", "b", "ab"])
    np.testing.assert_equal(each, [[1, np.nan, 1], [np.nan, 2, 2]])
    assert reward.total(each).tolist() == [0.5, 20, 20.5]
    with pytest.raises(RewardError, match="no function gives a number for the answer 'c'; fix"):
        reward(asked, ["a", "b", "c"])


def test_metrics_of_nothing_are_null():
    assert averages({"kl": (0.0, 0.0), "loss": (3.0, 2.0)}) == {"kl": None, "loss": 1.5}
    rows = [{"kl": None, "loss": 1.0}, {"kl": 4.0, "loss": "inf"}]
    assert means(rows) == {"loss": 1.0, "kl": 4.0}


def test_several_rewards_have_names_of_their_own():
    names = ["runs/judge/", "a.py:long", "b:long", "owner/model"]
    short = ["judge", "long_2", "long_3", "model"]
    assert metrics_of(names) == [f"rewards/{name}/mean" for name in short]
    assert metrics_of(names[:1]) == []


@pytest.mark.slow
def test_functions_compare_with_the_columns_of_the_prompt(ground, tmp_path, capsys):
    """A column goes with its prompt, and each of several rewards is logged."""
    rows = [{"prompt": f"what {i}?", "gold": i, "part": i % 2 or None} for i in range(12)]
    del rows[4]["part"]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own.py").write_text(
        "def matches(prompts, completions, gold, part):\n"
        "    assert prompts == [f'what {i}?' for i in gold]\n"
        "    assert part == [1 if i % 2 else None for i in gold]\n"
        "    return [float(len(text)) for text in completions]\n"
        "def vowels(completions):\n"
        "    return [float(text.count('e')) for text in completions]\n"
        "def of_odd(completions, part):\n"
        "    return [3 if odd else None for odd in part]\n"
    )
    own = tmp_path / "own.py"
    options = options_of(ground, **{"rl.reward": f"[{own}:matches, {own}:vowels, {own}:of_odd]"})
    options |= {"rl.reward_weights": "[0.25, 2.0, 0]", "data.eval": 5, "max_steps": 2}
    folder = tmp_path / "run"
    with pytest.raises(ConfigError) as error:
        train("rl", ground / "gpt2", ground, folder, **options)
    line = f"rl.reward: {own}:matches: missing a required argument: 'gold'; a function gets prompts"
    assert str(error.value) == f"{line}, completions and the columns of the data: prompt"
    assert not folder.exists()
    logged, _ = train("rl", ground / "gpt2", data, folder, **options)
    assert "read by reward functions only: column gold (" in capsys.readouterr().out
    for prefix in ("", "eval_"):
        row = next(row for row in logged if f"{prefix}reward" in row)
        first, second = (row[f"{prefix}rewards/{name}/mean"] for name in ("matches", "vowels"))
        assert first > 0 and row[f"{prefix}rewards/of_odd/mean"] == 3
        assert row[f"{prefix}reward"] == pytest.approx(0.25 * first + 2 * second, rel=1e-6)
    page = (folder / "report.html").read_text()
    assert "reward by vowels" in page and "eval_rewards/matches/mean" in page


def test_prompts_of_another_name_are_named(ground, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"question": "1 + 1?", "answer": "2"}] * 8)
    where = ("rl", ground / "gpt2", data, tmp_path / "run")
    with pytest.raises(DataError, match="found question, answer. Name one in data.columns, such"):
        prepare(*configure(*where, **options_of(ground)))
    setup = prepare(*configure(*where, **options_of(ground, **{"data.columns.prompt": "question"})))
    assert len(setup.data.train) == 8


def test_example_rewards():
    concise = function_of("easyaira.rewards.rules:concise")
    assert concise(["a"] * 3, ["yes", "w " * 45, "w " * 90]) == [1.0, 0.5, -1.0]
    sentence = function_of("easyaira.rewards.rules:one_sentence")
    assert sentence(["a"] * 4, ["Lima. ", "", "A. B.", "No"]) == [1.0, 0.0, 0.0, 0.0]


def test_prompts_are_counted(ground, tmp_path):
    """Empty ones and those without room for an answer are dropped with a reason; answers are not
    used."""
    rows = [{"prompt": f"what {i}?", "completion": "yes"} for i in range(8)]
    rows += [{"prompt": text, "completion": "no"} for text in ("no " * 60, " ")]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    options = options_of(ground, **{"data.max_dropped": 0.5})
    setup = prepare(
        *configure("rl", ground / "gpt2", tmp_path / "rows.jsonl", tmp_path / "run", **options)
    )
    report = setup.data.report["train"]
    assert report["kept"] == 8 and report["not used"] == {"column completion": 8}
    assert report["dropped"] == {"prompt leaves no room for an answer": 1, "empty prompt": 1}
    options = options_of(ground, **{"rl.max_completion_length": 62})
    with pytest.raises(DataError, match="rows, or lower rl.max_completion_length, or set data.max"):
        prepare(
            *configure("rl", ground / "gpt2", tmp_path / "rows.jsonl", tmp_path / "b", **options)
        )


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_a_dry_run_plans_update_and_roll_out(adapters, ground, tmp_path, capsys):
    """Policy, value model, reference, reward model and the cache, in float32. It needs no weights
    of reward and value model: a run that lacks them says so before its first update."""
    for name in ("bert", "judge"):
        shutil.copytree(ground / name, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    options = options_of(ground, **CYCLES["ppo"])
    options |= {"rl.reward": str(tmp_path / "bert"), "rl.value_model": str(tmp_path / "judge")}
    if adapters:
        options |= {"lora.r": 2, "lora.target_modules": "[c_attn]"}
    config, algorithm = configure("rl", ground / "gpt2", ground, tmp_path / "run", **options)
    run(config, algorithm, dry_run=DryRun())
    output = capsys.readouterr().out
    sizes = {
        words[1]: float(words[2].replace(",", "")) * 2**20
        for words in re.finditer(r"^([^\d\n]+?) +([\d,.]+)  [a-z]", output, re.MULTILINE)
    }
    policy = tiny.load(ground / "gpt2")[0]
    scorer = RewardModel(str(ground / "bert"), None).model
    half = 0.005 * 2**20 + 1  # of the last digit, with its end
    count = 0 if adapters else policy.parameter_count()
    assert sizes["reference"] == pytest.approx(4 * count, abs=half)
    assert sizes["reward models"] == pytest.approx(4 * scorer.parameter_count(), abs=half)
    # the tied head is a matrix of its own there
    assert 1 <= sizes["weights for sampling"] / (4 * policy.parameter_count()) < 2
    rows, slots = map(int, re.search(r"of (\d+) rows in (\d+) slots", output).groups())
    cache = 2 * policy.config.n_layer * rows * slots * policy.config.width * 4
    assert sizes["KV cache"] == pytest.approx(cache, abs=half)
    words = re.search(r"whole run needs .* GiB; (.*) in an update, (.*) in a rollout", output)
    assert words and all(float(size) < 0.1 for size in words.groups())
    assert not (tmp_path / "run").exists()
    with pytest.raises(WeightsError, match="bert: no model.safetensors"):
        run(config, algorithm, dry_run=None)
