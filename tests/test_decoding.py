"""Memory of generation: as predicted, as allocated, and in the words of a plan."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from easyaira import generate
from easyaira.distributed import cards
from easyaira.distributed.mesh import make_mesh
from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import Sampler
from easyaira.models.layers import Compute, padded_vocab
from easyaira.models.registry import model_of
from easyaira.plan import decoding
from easyaira.plan.cost import per_device
from helpers import tiny
from helpers.processes import call

# layers, key/value heads and head width of each, from its config.json
SIZES = {"llama": (2, 2, 4), "gemma2": (3, 2, 8)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mesh, rows_apart, heads_apart",
    [("llama", "fsdp=1", 1, 1), ("gemma2", "fsdp=4,tp=2", 4, 2)],
)
def test_keys_and_values_take_the_memory_that_is_predicted(
    name, mesh, rows_apart, heads_apart, devices, monkeypatch
):
    """With attention of several queries to a key (llama) and windows (gemma2)."""
    devices(rows_apart * heads_apart)
    mesh = make_mesh(mesh)
    model = model_of(tiny.CASES[name], name)
    sampler = Sampler(model, Sampling(max_new_tokens=40), rows=8)
    allocated = []
    decode = sampler.programs.decode

    def noted(weights, state, *given):
        arrays = jax.tree.leaves(state.cache)
        size = sum(array.addressable_shards[0].data.nbytes for array in arrays)
        allocated.append((size, len(arrays), arrays[0].shape))
        return decode(weights, state, *given)

    monkeypatch.setattr(sampler.programs, "decode", noted)
    with model.on(mesh):
        params = jax.jit(model.init)(jax.random.key(0))
        lengths = (3, 10, 7, 10, 2, 5, 9, 10)
        prompts = [list(range(2, length + 2)) for length in lengths]
        list(sampler.answers(sampler.weights(params), prompts))
    rows, slots = sampler.largest_cache(lengths)
    layers, heads, width = SIZES[name]
    formula = 2 * layers * rows * heads * slots * width * 4 // (rows_apart * heads_apart)
    assert max(allocated) == (formula, 2 * layers, (rows, heads, slots, width))
    assert per_device(decoding.empty_state(sampler, mesh, rows, slots).cache) == formula


@pytest.mark.parametrize(
    "length, limit, steps", [(1, 1, 32), (5, 2, 32), (30, 34, 32), (40, 24, 4)]
)
@pytest.mark.slow
def test_the_cache_grows_to_the_predicted_size(length, limit, steps):
    model = model_of(tiny.CONFIGS["llama"], "llama")
    sampler = Sampler(model, Sampling(max_new_tokens=limit), steps=steps)
    slots = []
    empty, resize, programs = sampler.programs.empty, sampler.programs.resize, sampler.programs
    programs.empty = lambda *given: slots.append(given[2]) or empty(*given)
    programs.resize = lambda *given: slots.append(given[1]) or resize(*given)
    params = jax.jit(model.init)(jax.random.key(0))
    list(sampler.answers(sampler.weights(params), [[5] * length]))
    assert max(slots) == sampler.largest_cache([length])[1]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    rows = {"rl": [{"prompt": f"what do you {i}"} for i in range(16)]}
    return tiny.ground(tmp_path_factory.mktemp("ground"), {"gpt2": tiny.CONFIGS["gpt2"]}, **rows)


def test_a_dry_run_of_generate_says_what_it_needs_and_writes_nothing(ground, tmp_path, capsys):
    files = [f"--prompts={ground / 'rl.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    flags = ["--template=plain", "--dry_run", "--max_new_tokens=40"]
    flags += ["--num_samples=2", "--temperature=1"]
    status, out, err = call(generate.main, [ground / "gpt2", *files, *flags], capsys)
    assert status == 0, err
    printed = re.search(r"of 32 rows in (\d+) slots, at most: ([\d,]+) bytes", out)
    assert int(printed[2].replace(",", "")) == 2 * 2 * 32 * 4 * int(printed[1]) * 4 * 4
    assert re.search(r"weights \d", out) and "in a step; compiled in" in out
    assert not list(tmp_path.iterdir())
    status, _, err = call(generate.main, [ground / "gpt2", "--chat", "--topology=v5e:2x2"], capsys)
    assert status == 2 and "--topology: needs --dry_run" in err


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_a_plan_for_a_card_that_is_not_here_counts_what_a_device_holds(
    dtype, size, ground, tmp_path, capsys
):
    files = [f"--prompts={ground / 'rl.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    flags = ["--template=plain", "--max_new_tokens=40", f"--dtype={dtype}"]
    folder = Path(shutil.copytree(ground / "gpt2", tmp_path / "without_weights"))
    (folder / "model.safetensors").unlink()
    asked = [folder, *files, *flags, "--dry_run", "--topology=rtx3060"]
    status, out, err = call(generate.main, asked, capsys)
    assert status == 0, err
    assert "of 16 rows in" in out and "compiled in" not in out
    assert re.search(r"\nfits: about \S+ GiB of 1[12]\.", out) and "RTX 3060 at" in out
    model = model_of(tiny.CONFIGS["gpt2"], "gpt2", Compute(jnp.dtype(dtype)))
    sampler, mesh = Sampler(model, Sampling()), make_mesh("fsdp=1")
    with model.on(mesh):
        weights = sampler.weights(jax.jit(model.init)(jax.random.key(0)))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    card = make_mesh("fsdp=1", cards.machine("rtx3060"))
    counted = decoding.measure(sampler, card, 16, 64)
    assert counted.weights == held
    assert counted.program.memory == held + counted.cache + 4 * 16 * padded_vocab(model.vocab_size)
    assert counted.cache == 2 * 2 * 16 * 4 * 64 * 4 * size
    two = decoding.measure(sampler, make_mesh("dp=2", cards.machine("rtx3060:2")), 16, 64)
    assert (two.weights, two.cache) == (held, counted.cache // 2)
