"""Conversion holds a few tensors at a time."""

import json
import subprocess
import sys
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import save_file

from easyaira import convert
from easyaira.distributed.tree import by_path
from easyaira.export import torch_check
from easyaira.hf import lazy, safetensors, transfer
from easyaira.storage.checkpoints import Checkpoints
from easyaira.storage.integrity import SumsWhileRead, sums_of
from helpers import tiny

MEASURE = """
import sys
from pathlib import Path
from easyaira import allocator, convert
from easyaira.export import torch_check
from easyaira.hf import lazy
from easyaira.storage import pretrained

allocator.keep_memory()
lazy.PIECE_BYTES = 2**24  # a few layers, as for a real model
torch_check.obstacle = lambda *_, **__: "its own process holds a whole model"
pretrained.find(sys.argv[1]).tokenizer()

def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10

for command, place, to in (("from_hf", 1, 2), ("to_hf", 2, 3)):
    before = peak(reset=True)
    convert.main([command, sys.argv[place], sys.argv[to]])
    print("peak", peak() - before)
"""
LAYERS, WIDTH, INNER = 8, 512, 2048


def large(folder):
    """A Llama of 34M parameters in bfloat16. Returns its bytes in float32."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    config = tiny.CONFIGS["llama"] | sizes | {"num_key_value_heads": 4, "num_attention_heads": 4}
    tiny.save(folder, config | {"num_hidden_layers": 1})
    stored = {n: np.array(t) for n, t in safetensors.open_folder(folder).items()}
    tensors = {}
    for name, tensor in stored.items():
        names = [name.replace(".0.", f".{i}.") for i in range(LAYERS)] if ".0." in name else [name]
        tensors |= {n: (tensor + i / 64).astype(jnp.bfloat16) for i, n in enumerate(names)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(changed))
    return 4 * sum(tensor.size for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_both_conversions_hold_less_than_the_model(tmp_path):
    size = large(tmp_path / "hf")
    folders = [str(tmp_path / name) for name in ("hf", "ours", "back")]
    command = [sys.executable, "-c", MEASURE, *folders]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peaks = [int(line.split()[1]) for line in out.splitlines() if line.startswith("peak ")]
    assert len(peaks) == 2 and max(peaks) < size, (peaks, size)
    file = "model.safetensors"
    assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


def test_a_file_is_written_as_by_the_library(tmp_path):
    rng = np.random.default_rng(0)
    kinds = safetensors.DTYPES.values()
    tensors = {f"{i}.{k}": rng.normal(size=(3, i)).astype(k) for i in range(4) for k in kinds}
    safetensors.save_folder(iter(tensors.items()), tmp_path)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_sums_of_pieces_are_those_of_the_array():
    array = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    pieces = lazy.Lazy(array.shape, array.dtype, lambda: (array[i : i + 3] for i in (0, 3, 6)))
    whole = sums_of({"params": jnp.asarray(array)}, {})
    read = SumsWhileRead({"params": pieces})
    np.testing.assert_array_equal(read.trees["params"].read(), array)
    assert read.sums() == whole
    assert sums_of({"params": jnp.asarray(array[::-1])}, {}) != whole


def test_a_conversion_that_is_interrupted_reads_no_further(tmp_path, monkeypatch):
    """It read and wrote the rest of the weights before it ended."""
    begun, count, calls = threading.Event(), [], []

    def pieces():
        for _ in range(500):
            count.append(begun.set())
            time.sleep(0.01)
            yield np.zeros((1, 4), np.float32)

    array = lazy.Lazy((500, 4), np.dtype(np.float32), pieces)
    with pytest.raises(KeyboardInterrupt), closing(Checkpoints(tmp_path, write=True)) as saving:
        wait = saving.wait

        def interrupted():
            calls.append(begun.is_set() or begun.wait(10) if calls else None)
            if len(calls) == 2:  # the first is before the save
                raise KeyboardInterrupt
            wait()

        monkeypatch.setattr(saving, "wait", interrupted)
        saving.save_params(0, {"a": array}, {})
    assert 0 < len(count) < 250


@pytest.mark.parametrize("shape", [(256, 32), (257, 33), (300, 7), (5, 100), (1, 1), (4, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_transposed_matrix_is_copied_in_tiles(shape, dtype):
    stored = np.random.default_rng(0).normal(size=shape[::-1]).astype(dtype)
    for view in (stored.T, stored, np.asfortranarray(stored), stored.T[:, ::-1], stored[None]):
        for target in (np.float32, jnp.bfloat16):
            room = np.full([size + 1 for size in view.shape], np.nan, target)  # a padded table
            part = room[tuple(map(slice, view.shape))]
            transfer._copy(part, view)
            np.testing.assert_array_equal(part, view.astype(target))
            assert np.isnan(room.astype(np.float32)).sum() == room.size - view.size


@pytest.mark.parametrize(
    "dtypes, kept",
    [
        ([jnp.bfloat16, jnp.bfloat16], jnp.bfloat16),
        ([np.float16, np.float16], np.float16),
        ([jnp.bfloat16, np.float16], np.float32),
        ([np.float32, jnp.bfloat16], np.float32),
        ([np.float64, np.float64], np.float32),
    ],
)
def test_a_converted_parameter_is_stored_in_the_dtype_of_its_tensors(dtypes, kept, tmp_path):
    """And is read in float32, with the checksums of float32."""
    tiny.save(tmp_path / "hf", tiny.CONFIGS["gpt2"])
    tensors = {n: np.array(t) for n, t in safetensors.open_folder(tmp_path / "hf").items()}
    for layer, dtype in enumerate(dtypes):
        tensors |= {n: t.astype(dtype) for n, t in tensors.items() if f"h.{layer}." in n}
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    convert.main(["from_hf", str(tmp_path / "hf"), str(tmp_path / "ours")])
    folder = f"file://{tmp_path}/ours/checkpoints/0/params/"
    place = {"driver": "ocdbt", "base": folder, "path": "model.h.mlp.c_fc.kernel/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": place}).result()
    assert stored.dtype.numpy_dtype == kept
    for params in (tiny.load(tmp_path / name)[1] for name in ("hf", "ours")):
        leaves = by_path(params)
        assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
        ours = np.asarray(leaves["model/h/mlp/c_fc/kernel"])
        theirs = [tensors[f"transformer.h.{i}.mlp.c_fc.weight"] for i in range(len(dtypes))]
        np.testing.assert_array_equal(ours, np.stack([t.astype(np.float32) for t in theirs]))


@pytest.mark.parametrize(
    "available, why", [(2**20, "needs 4.66 GiB of memory, 0.00 are free"), (2**33, None)]
)
def test_memory_that_holds_cached_files_is_free(available, why, monkeypatch):
    memory = SimpleNamespace(available=available, free=0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert torch_check.obstacle(10**9, adapter=False) == why


def test_converted_pieces_are_not_stored_in_the_dtype_they_came_from():
    third = np.full(3, 1 / 3, np.float32)  # not a bfloat16
    half = lazy.Lazy(
        third.shape, third.dtype, lambda: [third * 0 + 0.5], kept=np.dtype(jnp.bfloat16)
    )
    changed = half.then(lambda piece: third)
    assert changed.kept is None and half.kept == jnp.bfloat16
