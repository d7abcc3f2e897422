"""The reference's log-probabilities: computed once, kept under all that decides them."""

import jax
import numpy as np
import pytest

from easyaira.algorithms import reference_cache
from easyaira.data import cache
from easyaira.errors import Preempted
from easyaira.run.run import run
from easyaira.storage.integrity import fingerprint
from easyaira.train import loader
from helpers import tiny
from helpers.runs import configure, train

FEW = {"max_steps": 4, "data.eval": 0.2}


@pytest.fixture
def scored(monkeypatch):
    """How many updates were scored for the cache."""
    counts = []
    whole = reference_cache.score_all

    def counted(score, params, batches, setup, logps):
        counts.append(int(np.isnan(logps[:, 0]).sum()))
        whole(score, params, batches, setup, logps)

    monkeypatch.setattr(reference_cache, "score_all", counted)
    return counts


def kept(config):
    return sorted((cache.cache_root(config.data) / "reference").iterdir())


@pytest.mark.slow
def test_later_runs_read_what_the_first_has_computed(models, data, tmp_path, scored):
    first, _ = train("dpo", models / "gpt2", data, tmp_path / "1", **FEW)
    assert len(scored) == 2  # training and held-out examples
    other = {"dpo.beta": 0.5, "dpo.loss_type": "ipo", "optimizer.learning_rate": 1e-4}
    rows, _ = train("dpo", models / "gpt2", data, tmp_path / "2", **FEW, **other)
    assert len(scored) == 2
    assert rows[0]["rewards/margins"] == 0
    again, _ = train("dpo", models / "gpt2", data, tmp_path / "3", **FEW)
    assert [row["loss"] for row in again[1:]] == [row["loss"] for row in first[1:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"data.max_length": 12, "data.max_dropped": 0.9},
        {"data.template": "tulu"},
        {"seed": 7},
        {"train_batch_size": 4},
        {"data.share_prompt": "never"},
    ],
)
def test_whatever_changes_their_bits_has_another_key(change, models, data, tmp_path, scored):
    train("dpo", models / "gpt2", data, tmp_path / "1", **FEW)
    train("dpo", models / "gpt2", data, tmp_path / "2", **FEW, **change)
    assert len(scored) == 4


@pytest.mark.slow
def test_other_weights_have_another_key(models, data, tmp_path, scored):
    train("dpo", models / "gpt2", data, tmp_path / "1", **FEW)
    tiny.save(tmp_path / "other", tiny.CONFIGS["gpt2"], std=0.19)
    train("dpo", tmp_path / "other", data, tmp_path / "2", **FEW)
    assert len(scored) == 4


@pytest.mark.slow
def test_an_interrupted_computation_is_gone_on_with(
    models,
    data,
    tmp_path,
    scored,
    monkeypatch,
):
    config, algorithm = configure("dpo", models / "gpt2", data, tmp_path / "1", **FEW)
    ahead = loader.ahead

    def stopped(*args):
        for number, ready in enumerate(ahead(*args)):
            if number == 2:
                raise Preempted("stopped")
            yield ready

    with monkeypatch.context() as soon:
        soon.setattr(loader, "ahead", stopped)
        with pytest.raises(Preempted):
            run(config, algorithm, dry_run=False)
    rows, _ = train("dpo", models / "gpt2", data, tmp_path / "1", **FEW)
    missing = scored[1]
    assert scored[0] == 32 and missing == 16  # two of four updates were not done again
    through = np.load(kept(config)[0]), np.load(kept(config)[1])
    for file in kept(config):
        file.unlink()
    again, _ = train("dpo", models / "gpt2", data, tmp_path / "2", **FEW)
    for one, other in zip(through, map(np.load, kept(config)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [row["loss"] for row in rows[1:]] == [row["loss"] for row in again[1:]]


def test_a_fingerprint_sees_every_bit_and_no_mesh(tmp_path, devices):
    devices(8)
    tiny.save(tmp_path, tiny.CONFIGS["llama"])
    _, params = tiny.load(tmp_path, "fsdp=8")
    whole = fingerprint(params)
    for mesh in ("dp=8", "fsdp=4,tp=2"):
        assert fingerprint(tiny.load(tmp_path, mesh)[1]) == whole
    leaves, tree = jax.tree.flatten(params)
    for i in range(len(leaves)):
        changed = np.asarray(leaves[i]).copy()
        changed.view(np.uint32).flat[-1] ^= 1
        others = [*leaves[:i], jax.numpy.asarray(changed), *leaves[i + 1 :]]
        assert fingerprint(jax.tree.unflatten(tree, others)) != whole
    swapped = np.asarray(leaves[0]).copy()
    swapped.flat[:2] = swapped.flat[:2][::-1].copy()
    others = [jax.numpy.asarray(swapped), *leaves[1:]]
    assert fingerprint(jax.tree.unflatten(tree, others)) != whole
