"""Checkpoints that are damaged, killed, moved to other meshes and other places."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira import train_sft
from easyaira.distributed import mesh as meshes
from easyaira.distributed.tree import abstract, by_path
from easyaira.errors import ConfigError, StorageError
from easyaira.models.registry import model_of
from easyaira.storage import object_store, orbax_errors, pretrained
from easyaira.storage.checkpoints import Checkpoints
from easyaira.storage.integrity import bit_sums
from helpers import tiny
from helpers.processes import call
from helpers.runs import argv

SPECS = {"kernel": P("fsdp", "tp"), "bias": P(), "embed": P(("dp", "fsdp"))}


def state(mesh, seed=0):
    """Parameters and their optimizer's state, divided."""
    key = jax.random.key(seed)
    shapes = {"kernel": (64, 48), "bias": (48,), "embed": (64, 48)}
    params = {
        name: jax.device_put(
            jax.random.normal(jax.random.fold_in(key, i), shape),
            NamedSharding(mesh, SPECS[name]),
        )
        for i, (name, shape) in enumerate(shapes.items())
    }
    tx = optax.adamw(1e-3)
    _, opt_state = tx.update(params, tx.init(params), params)
    whole = NamedSharding(mesh, P())
    opt_state = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, whole), opt_state)
    return params, opt_state


def save(folder, steps, mesh, keep=None):
    with closing(Checkpoints(folder, keep, write=True)) as checkpoints:
        for step in steps:
            checkpoints.save(step, *state(mesh, step), {"update": step}, {"loss": [step, 0.1]})


def restore_latest(folder, mesh):
    with closing(Checkpoints(folder, write=True)) as checkpoints:
        return checkpoints.restore_latest(*map(abstract, state(mesh)))


def same(saved, mesh):
    """Whether a checkpoint holds, bit for bit, what was saved as that step."""
    wanted = [*state(mesh, saved.step), {"update": saved.step}, {"loss": [saved.step, 0.1]}]
    equal = jax.tree.map(lambda x, y: np.array_equal(x, y), list(saved[1:]), wanted)
    return all(jax.tree.leaves(equal))


@pytest.fixture(scope="module")
def eight():
    return meshes.make_mesh("fsdp=8", jax.devices())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, eight):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, [2, 4], eight)
    return folder


def flip(raw, at):
    at = int(at * len(raw))
    return raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :] if raw else raw


@pytest.mark.slow
def test_every_damage_is_found_or_harmless(saved, eight, tmp_path):
    """Of every file of the newest checkpoint; Orbax alone gives other numbers for flipped ones."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved / "4", folder / "4")
    target = list(map(abstract, state(eight)))
    sizes = {p: p.stat().st_size for p in sorted((folder / "4").rglob("*")) if p.is_file()}
    arrays = [path for path, size in sizes.items() if size > 8000]
    assert len(arrays) >= 2
    damages = {
        "cut": lambda raw: raw[: len(raw) // 2],
        "empty": lambda raw: b"",
        "delete": lambda raw: None,
        **{f"flip at {at}": lambda raw, at=at: flip(raw, at) for at in (0.2, 0.5, 0.95)},
    }
    few = ("delete", "flip at 0.5")
    cases = [(path, name) for path in sizes for name in damages if path in arrays or name in few]
    detected = set()
    for path, name in cases:
        raw = path.read_bytes()
        bad = damages[name](raw)
        path.write_bytes(bad) if bad is not None else path.unlink()
        with closing(Checkpoints(folder)) as checkpoints:
            try:
                assert same(checkpoints.restore(4, *target), eight), (path, name)
            except StorageError as error:
                message = str(error)
                assert message.startswith(f"{folder}/4: cannot be restored: ")
                assert len(message) < 500 and "\n" not in message
                detected.add(path)
        path.write_bytes(raw)
    assert detected >= {*arrays, *(folder / "4").glob("*/metadata"), *folder.glob("4/*/manifest.*")}
    x, y = (path.read_bytes() for path in arrays[:2])
    arrays[0].write_bytes(y), arrays[1].write_bytes(x)
    with closing(Checkpoints(folder)) as checkpoints, pytest.raises(StorageError):
        checkpoints.restore(4, *target)


def test_an_array_that_changed_is_named_also_where_weights_alone_are_read(saved, eight, tmp_path):
    shutil.copytree(saved / "4", tmp_path / "4")
    for path in (tmp_path / "4").rglob("*"):
        if path.is_file() and path.stat().st_size > 8000:
            path.write_bytes(flip(path.read_bytes(), 0.5))
    target = abstract(state(eight)[0])
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.meta(4) == {"loss": [4, 0.1]}
        with pytest.raises(StorageError, match="/4: .* params/(kernel|embed)"):
            checkpoints.restore_params(4, target)


@pytest.mark.parametrize("text, count", [("fsdp=1", 1), ("dp=2,fsdp=2,tp=2", 8), ("tp=2", 2)])
@pytest.mark.slow
def test_any_mesh_reads_it_and_finds_the_same_sums(text, count, saved, eight):
    mesh = meshes.make_mesh(text, jax.devices()[:count])
    restored = restore_latest(saved, mesh)
    assert restored.step == 4 and same(restored, eight)
    assert restored.params["kernel"].sharding == NamedSharding(mesh, SPECS["kernel"])


def test_sums_know_every_bit_of_every_type():
    trees = [
        jnp.arange(1000, dtype=jnp.float32),
        jnp.array([2**31 - 1, -(2**31), 2**24 + 1, 5], jnp.int32),
        jnp.arange(300, dtype=jnp.bfloat16),
        jnp.array([True, False, True]),
        jnp.arange(200, dtype=jnp.uint8),
    ]
    for tree in trees:
        raw = np.asarray(tree)
        sums = {tuple(np.asarray(bit_sums(raw)).tolist())}
        bits = np.arange(raw.nbytes * 8) if raw.dtype != bool else np.arange(0, 24, 8)
        chosen = bits[:: max(1, len(bits) // 50)]
        for bit in chosen:
            other = bytearray(raw.tobytes())
            other[bit // 8] ^= 1 << (bit % 8)
            changed = np.frombuffer(bytes(other), raw.dtype)
            sums.add(tuple(np.asarray(bit_sums(changed)).tolist()))
        assert len(sums) == len(chosen) + 1, tree.dtype


@pytest.mark.slow
def test_a_damaged_newest_is_moved_aside_and_its_step_saved_again(saved, eight, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    (folder / "4/opt_state/manifest.ocdbt").unlink()
    (folder / "5.orbax-checkpoint-tmp").mkdir()  # a killed save
    (folder / "mine").mkdir()
    with closing(Checkpoints(folder)) as reader:  # who only reads moves nothing
        assert reader.restore_latest(*map(abstract, state(eight))).step == 2
    assert {p.name for p in folder.iterdir()} == {"2", "4", "5.orbax-checkpoint-tmp", "mine"}
    for name in ("4.damaged", "4.damaged-1"):
        capsys.readouterr()
        restored = restore_latest(folder, eight)
        assert restored.step == 2 and same(restored, eight)
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and f"kept as {name}; resuming from 2" in out
        assert f"{folder}/4: cannot be restored: opt_state/0/" in out
        save(folder, [4], eight)
        restored = restore_latest(folder, eight)
        assert restored.step == 4 and same(restored, eight)
        (folder / "4/sums/metadata").write_text("{}") if name == "4.damaged" else None
        (folder / "4/opt_state/manifest.ocdbt").unlink() if name == "4.damaged" else None
    assert {p.name for p in folder.iterdir()} == {"2", "4", "4.damaged", "4.damaged-1", "mine"}


def test_with_no_good_one_left_nothing_is_touched(saved, eight, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "2/data")
    (tmp_path / "4/meta/metadata").write_text('{"loss": [4, 0.2]}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        StorageError, match="no intact checkpoint .*4: .*meta differs .*; .*2: .*data"
    ):
        restore_latest(tmp_path, eight)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_save_is_told_and_what_was_saved_is_still_known(eight, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, write=True)
    checkpoints.save(1, *state(eight, 1), {}, {})
    checkpoints.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        checkpoints.save(2, *state(eight, 2), {}, {})
        with pytest.raises(StorageError, match="/2: cannot be saved: .*No space.*steps: .1"):
            checkpoints.close()
    assert checkpoints.latest() == 1
    save(tmp_path, [2], eight)
    assert restore_latest(tmp_path, eight).step == 2


@pytest.mark.slow
def test_a_full_disk_in_a_save_is_one_line_with_its_cause(models, data, tmp_path):
    """A limit on the size of a file stands for a disk.

    Which arrays share a file is a matter of timing; a single one (the kernels of the MLP,
    490 kB) is larger than the limit.
    """
    tiny.save(tmp_path / "wide", tiny.CONFIGS["gpt2"] | {"n_embd": 128})
    run = tmp_path / "run"
    arguments = argv("sft", tmp_path / "wide", data, run, max_steps=4, save_steps=2)
    words = [sys.executable, "-m", "easyaira.train_sft", *map(str, arguments)]
    limited = ["bash", "-c", 'ulimit -f 400; exec "$@"', "bash", *words]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # Python would cut it at the limit, for all tests
    done = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert done.stderr == f"error: {run}/checkpoints/2: cannot be saved: File too large\n"


@pytest.mark.slow
def test_a_disk_without_room_for_a_folder_ends_the_command_at_once(models, tmp_path):
    """Threads of Orbax waited five minutes for the folder."""
    code = """
        import os
        def full(path, *arguments, make=os.mkdir, **named):
            if "params" in os.fspath(path):
                raise OSError(28, os.strerror(28), os.fspath(path))
            return make(path, *arguments, **named)
        os.mkdir = full
        from easyaira.__main__ import main
        main()
        """
    words = [sys.executable, "-c", textwrap.dedent(code), "convert", "from_hf"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*words, str(models / "gpt2"), str(out)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4 and not list(tmp_path.iterdir()), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == f"error: {out}/checkpoints/0: cannot be saved: {os.strerror(28)}"


@pytest.mark.slow
def test_a_write_abandoned_by_a_failed_save_prints_nothing():
    """Whether Orbax abandons one depends on timing; Python collects it at the end at the latest."""
    code = "import easyaira.storage.orbax_errors\nasync def write(): pass\nkept = write()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_cause_comes_before_the_paths():
    text = 'RESOURCE_EXHAUSTED: Error writing local file "' + "x" * 500 + '": Failed: '
    assert orbax_errors.short(ValueError(text + os.strerror(28))) == os.strerror(28)


def test_a_record_that_is_missing_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    origin = pretrained.find(str(tmp_path))
    for name in ("config", "generation_config"):
        with pytest.raises(StorageError, match=f"checkpoints/4: its meta record has no {name}"):
            getattr(origin, name)
    with pytest.raises(StorageError, match="its meta record has no stored_dtypes"):
        origin.stored_dtypes()


@pytest.mark.slow
def test_a_run_killed_anywhere_in_a_save_ends_with_the_same_bits(tmp_path):
    new, items = "4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp/{}.orbax-checkpoint-tmp"
    points = [
        f"mkdir {new}",
        f"remove {items.format('params')}/_METADATA",
        f"rename {items.format('opt_state')}",
        f"rename {new}",
        "unlink manifest.ocdbt",  # while the oldest is removed
    ]
    command = [
        sys.executable,
        str(Path(__file__).with_name("helpers") / "killed_saves.py"),
        str(tmp_path),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, *points], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [row[0] for row in rows] == points
    for point, killed, left, equal in rows:
        finished = [int(name) for name in left if name.isdigit()]
        assert killed and equal and max(finished) >= 3 and len(finished) >= 2, (point, left)


# ---------------------------------------------------------------------------------------------
# runs


SAVED = {"max_steps": 6, "save_steps": 2, "save_total_limit": 9}


def weights_of(folder, step):
    """What a checkpoint's sums say of each of its arrays."""
    sums = json.loads((folder / str(step) / "sums/metadata").read_text())
    return {name: value for name, value in sums.items() if "/" in name}


@pytest.mark.slow
def test_a_run_goes_on_from_the_newest_good_one_to_the_same_weights(models, data, tmp_path, capsys):
    run, place = tmp_path / "run", tmp_path / "elsewhere"
    arguments = argv("sft", models / "gpt2", data, run, checkpoint_dir=place, **SAVED)
    assert call(train_sft.main, arguments, capsys)[0] == 0
    assert {p.name for p in place.iterdir()} == {"2", "4", "6"}
    assert not (run / "checkpoints").exists()
    whole = weights_of(place, 6)
    shutil.rmtree(place / "6")
    (place / "4/params/manifest.ocdbt").write_bytes(b"")
    status, out, err = call(train_sft.main, arguments, capsys)
    assert status == 0, err
    assert "resuming from 2" in out and f"continues {run} after update 2" in out
    assert {p.name for p in place.iterdir()} == {"2", "4", "6", "4.damaged"}
    assert weights_of(place, 6) == whole
    assert pretrained.find(str(run)).step == 6
    origin = pretrained.find(str(run / "checkpoints/4"))  # where nothing lies
    model = model_of(origin.config, "")
    params = origin.load(model, meshes.make_mesh("fsdp=1"))
    assert by_path(params).keys() == by_path(model.shapes).keys()
    assert pretrained.find(origin.location()["name"]).step == 4

    # another machine, with nothing but the checkpoints; then another run, then another place
    fresh = [*arguments, f"--output_dir={tmp_path / 'fresh'}"]
    status, out, err = call(train_sft.main, fresh, capsys)
    assert status == 0 and "finished after 6 updates" in out, err
    other = [*arguments, f"--output_dir={tmp_path / 'other'}", "--seed=1"]
    status, _, err = call(train_sft.main, other, capsys)
    assert status == 2 and f"seed: the run in {place} was started with 42" in err
    assert not (tmp_path / "other").exists()
    status, _, err = call(train_sft.main, [*arguments, f"--checkpoint_dir={tmp_path}/x"], capsys)
    assert status == 2 and f"checkpoint_dir: {tmp_path}/x holds no checkpoint" in err
    assert yaml.safe_load((run / "config.yaml").read_text())["checkpoint_dir"] == str(place)


def test_places_that_cannot_be(models, data, tmp_path, capsys, monkeypatch):
    for place in ("gs:/bucket/x", "hdfs://x/y", "s3://"):
        arguments = argv("sft", models / "gpt2", data, tmp_path, checkpoint_dir=place)
        status, _, err = call(train_sft.main, arguments, capsys)
        assert status == 2 and f"checkpoint_dir: cannot read '{place}'" in err
    monkeypatch.setattr(object_store.importlib.util, "find_spec", lambda _: None)
    for scheme, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        with pytest.raises(ConfigError, match=rf"{package} is not installed; .*{scheme}"):
            Checkpoints(f"{scheme}://bucket/path")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket of a store that speaks S3, on this machine."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import s3fs

        for _ in range(100):
            try:
                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
                break
            except Exception:
                time.sleep(0.2)
        yield "s3://bucket"
    server.kill()
    server.wait()


@pytest.mark.slow
def test_an_object_store_does_all_that_a_folder_does(bucket, eight, capsys):
    folder = f"{bucket}/run"
    store = object_store.fsspec_backend.fs(folder)
    store.pipe_file(f"{folder}/mine/notes.txt", b"no checkpoint")
    store.pipe_file(f"{folder}/7/params/half", b"a killed save")
    save(folder, [1, 2, 3], eight, keep=2)
    names = {path.name for path in object_store.epath.Path(folder).iterdir()}
    assert names == {"2", "3", "mine"}
    mesh = meshes.make_mesh("dp=2,fsdp=2,tp=2", jax.devices())
    restored = restore_latest(folder, mesh)
    assert restored.step == 3 and same(restored, eight)
    files = store.find(f"{folder}/3/params", detail=True)
    large = max(files, key=lambda name: files[name]["size"])
    store.pipe_file(large, flip(store.cat_file(large), 0.5))
    restored = restore_latest(folder, mesh)
    assert restored.step == 2 and same(restored, eight)
    assert f"{folder}/3: cannot be restored: params/" in capsys.readouterr().out
    save(folder, [3], eight)
    with closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.steps() == [2, 3] and checkpoints.meta(3) == {"loss": [3, 0.1]}
        names = {path.name for path in checkpoints.folder.iterdir()}
    assert names == {"2", "3", "3.damaged", "mine"}
