"""The reference's log-probabilities: computed once, kept under all that decides them."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from easyaira.algorithms import dpo, reference_cache
from easyaira.algorithms.reference import make_score
from easyaira.data import cache
from easyaira.distributed import compiler
from easyaira.errors import Preempted
from easyaira.run.run import run
from easyaira.storage.integrity import fingerprint
from easyaira.train import loader
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.damage import DAMAGES
from helpers.runs import configure, same_bits, stop_after, train

FEW = {"max_steps": 4, "data.eval": 0.2}


@pytest.fixture
def scored(monkeypatch):
    """How many updates were scored for the cache."""
    counts = []
    whole = reference_cache.score_all

    def counted(score, params, batches, setup, logps, partial):
        counts.append(int(np.isnan(logps[:, 0]).sum()))
        whole(score, params, batches, setup, logps, partial)

    monkeypatch.setattr(reference_cache, "score_all", counted)
    return counts


def begun(model, data, out, **options):
    """Log-probabilities of a run's training and held-out examples, without an update."""
    config, algorithm = configure("dpo", model, data, out, **FEW, **options)
    setup, folder = prepare(config, algorithm), Path(config.output_dir)
    folder.mkdir()
    with setup.model.on(setup.mesh):
        beginning = algorithm.begin(setup, setup.trainable.start(), folder, True)
    parts = (beginning.known, beginning.known_held_out)
    return [np.array(known["ref_logps"]) for known in parts]  # no longer mapped from the cache


def kept(config):
    return sorted((cache.cache_root(config.data.cache_dir) / "reference").iterdir())


@pytest.mark.slow
def test_later_runs_read_what_the_first_has_computed(models, data, tmp_path, scored):
    first, _ = train("dpo", models / "gpt2", data, tmp_path / "1", **FEW)
    assert len(scored) == 2  # training and held-out examples
    other = {"dpo.beta": 0.5, "dpo.loss_type": "ipo", "optimizer.learning_rate": 1e-4}
    rows, _ = train("dpo", models / "gpt2", data, tmp_path / "2", **FEW, **other)
    assert len(scored) == 2
    assert rows[0]["rewards/margins"] == 0
    third, _ = train("dpo", models / "gpt2", data, tmp_path / "3", **FEW)
    assert [row["loss"] for row in third[1:]] == [row["loss"] for row in first[1:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"data.max_length": 12, "data.max_dropped": 0.9},
        {"data.template": "tulu"},
        {"seed": 7},
        {"train_batch_size": 4},
        {"data.share_prompt": "never"},
        {"dpo.ld_alpha": 0.5},
    ],
)
def test_whatever_changes_their_bits_has_another_key(change, models, data, tmp_path, scored):
    begun(models / "gpt2", data, tmp_path / "1")
    begun(models / "gpt2", data, tmp_path / "2", **change)
    assert len(scored) == 4


@pytest.mark.slow
def test_the_reference_and_the_first_batch_are_scored_by_one_program(
    models, data, tmp_path, monkeypatch
):
    traced, answer_scores = [], dpo.answer_scores

    def counted(model, weights, part, **options):
        traced.append(part["tokens"].shape)
        return answer_scores(model, weights, part, **options)

    monkeypatch.setattr(dpo, "answer_scores", counted)
    begun(models / "gpt2", data, tmp_path / "1")
    assert len(traced) == len(set(traced)) == 2  # training and held-out examples


@pytest.mark.slow
@pytest.mark.parametrize("other", ["flags", "instructions"])
def test_other_machine_code_has_another_key(other, models, data, tmp_path, scored, monkeypatch):
    """A folder may be shared by machines; else a CPU's results would be compared with another's."""
    begun(models / "gpt2", data, tmp_path / "1")
    if other == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    else:
        (tmp_path / "cpuinfo").write_text("processor : 0\nflags     : sse2 avx\n")
        monkeypatch.setattr(compiler, "CPU_INFO", tmp_path / "cpuinfo")
    begun(models / "gpt2", data, tmp_path / "2")
    assert len(scored) == 4


@pytest.mark.slow
def test_other_weights_have_another_key(models, data, tmp_path, scored):
    begun(models / "gpt2", data, tmp_path / "1")
    tiny.save(tmp_path / "other", tiny.CONFIGS["gpt2"], std=0.19)
    begun(tmp_path / "other", data, tmp_path / "2")
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
    through = [np.load(entry / "logps.npy") for entry in kept(config)]
    for entry in kept(config):
        shutil.rmtree(entry)
    uninterrupted, _ = train("dpo", models / "gpt2", data, tmp_path / "2", **FEW)
    for one, entry in zip(through, kept(config), strict=True):
        np.testing.assert_array_equal(one, np.load(entry / "logps.npy"))
    assert [row["loss"] for row in rows[1:]] == [row["loss"] for row in uninterrupted[1:]]


@pytest.fixture
def interrupted(models, data, tmp_path, monkeypatch):
    """A run that was stopped after an update, and the cache's two entries by their part."""

    def made(**options):
        given = ("dpo", models / "gpt2", data, tmp_path / "run")
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Preempted):
                train(*given, **FEW, **options)
        keys = json.loads((tmp_path / "run" / "reference.json").read_text())
        root = kept(configure(*given, **FEW)[0])[0].parent
        return lambda: train(*given, **FEW, **options), keys, root

    return made


@pytest.mark.slow
def test_damaged_log_probabilities_are_computed_again(
    interrupted, models, data, tmp_path, scored, capsys
):
    go_on, keys, root = interrupted()
    _, trained = train("dpo", models / "gpt2", data, tmp_path / "straight", **FEW)
    setup = prepare(*configure("dpo", models / "gpt2", data, tmp_path / "read", **FEW))
    score = make_score(partial(dpo.answer_scores, setup.model, examples=setup.micro_batch))
    params = setup.trainable.start()

    def read(folder):
        folder.mkdir()
        parts = {"train": setup.batches, "held_out": setup.held_out}
        with setup.model.on(setup.mesh):
            return [
                reference_cache.logps_of(setup, part, name, lambda: params, score, folder, True)
                for name, part in parts.items()
            ]

    right = [np.array(logps) for logps in read(tmp_path / "right")]  # mapped from the cache
    assert not scored[2:]
    files = ("logps.npy", "decides.json", "sha256.json")
    for number, (name, damage) in enumerate((n, d) for n in files for d in DAMAGES):
        for key in (keys["train"], keys["held_out"]):
            DAMAGES[damage](root / key / name)
        capsys.readouterr()
        scored.clear()
        recomputed = read(tmp_path / str(number))
        assert len(scored) == 2 and capsys.readouterr().out.count(" is damaged (") == 2
        same_bits(recomputed, right)
    DAMAGES["flip"](root / keys["train"] / "logps.npy")  # of a run that is continued
    same_bits(go_on()[1], trained)


def partial_of(count):
    rows = np.zeros(count, reference_cache.row_of(2))
    rows["logps"] = -np.arange(2 * count).reshape(count, 2)
    rows["sum"] = reference_cache._sums(np.arange(count), rows["logps"])
    return rows


def test_a_row_of_an_interrupted_computation_counts_with_its_checksum_alone(tmp_path, capsys):
    file = tmp_path / "partial.npy"
    np.save(file, partial_of(8))
    content = file.read_bytes()
    data = len(content) - 8 * reference_cache.row_of(2).itemsize
    for bit in range(8 * data, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        rows = reference_cache._open_partial(file, 8, 2)
        intact = rows["sum"] == reference_cache._sums(np.arange(8), rows["logps"])
        assert (
            intact.sum() == 7
            and not intact[(bit // 8 - data) // reference_cache.row_of(2).itemsize]
        )
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", b"x", bytes(200), "cut", "short", "header", "link"], ids=str
)
def test_a_damaged_file_of_an_interrupted_computation_is_begun_again(content, tmp_path, capsys):
    file, outside = tmp_path / "partial.npy", tmp_path / "outside.npy"
    np.save(file, partial_of(4 if content == "short" else 8))
    whole = file.read_bytes()
    if content == "link":
        file.rename(outside)
        file.symlink_to(outside)
    elif content == "cut":
        file.write_bytes(whole[:-20])
    elif content == "header":
        file.write_bytes(whole.replace(b"descr", b"desbr"))
    elif content != "short":
        file.write_bytes(content)
    rows = reference_cache._open_partial(file, 8, 2)
    intact = rows["sum"] == reference_cache._sums(np.arange(8), rows["logps"])
    assert len(rows) == 8 and intact.sum() == (6 if content == "cut" else 0)
    assert content in ("link", "cut") or f"{file} is damaged" in capsys.readouterr().out
    assert not file.is_symlink() and (content != "link" or outside.read_bytes() == whole)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"train": "../../../outside/other"}',
        '{"train": "/outside/other"}',
        '{"train": 5}',
        '{"weights": "0"}',
        '{"train": "' + 31 * "0",
        "[]",
        "\x00" * 40,
    ],
)
def test_a_key_is_hexadecimal_digits_or_computed_again(content, tmp_path, capsys):
    record = tmp_path / "reference.json"
    record.write_text(content)
    assert reference_cache._recorded(record) == {}
    out = capsys.readouterr().out
    assert str(record) in out and out.count("\n") == 1


@pytest.mark.slow
def test_the_results_of_another_run_are_not_taken_and_those_of_another_mesh_are_named(
    interrupted, models, data, tmp_path, devices, scored, capsys
):
    go_on, keys, root = interrupted()
    _, params = train("dpo", models / "gpt2", data, tmp_path / "straight", **FEW)
    tiny.save(tmp_path / "model", tiny.CONFIGS["gpt2"], std=0.19)
    begun(tmp_path / "model", data, tmp_path / "other")  # of the same shape
    other = json.loads((tmp_path / "other/reference.json").read_text())
    record = tmp_path / "run/reference.json"
    record.write_text(json.dumps(keys | {"train": other["train"]}))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    same_bits(go_on()[1], params)

    shutil.rmtree(tmp_path / "run")
    (tmp_path / "copy").rename(tmp_path / "run")
    record.write_text(json.dumps(keys))
    devices(2)
    scored.clear()
    capsys.readouterr()
    go_on()
    out = capsys.readouterr().out
    assert not scored and f"reference {keys['train']}, as before; this command would" in out


@pytest.mark.slow
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
        others = [*leaves[:i], jax.device_put(changed, leaves[i].sharding), *leaves[i + 1 :]]
        assert fingerprint(jax.tree.unflatten(tree, others)) != whole
    swapped = np.asarray(leaves[0]).copy()
    swapped.flat[:2] = swapped.flat[:2][::-1].copy()
    others = [jax.device_put(swapped, leaves[0].sharding), *leaves[1:]]
    assert fingerprint(jax.tree.unflatten(tree, others)) != whole
