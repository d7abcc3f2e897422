"""Plans for GPUs that are not there, by name or by their memory alone."""

import importlib.util
import os
import re
from dataclasses import replace

import jax
import pytest
from jax.experimental import topologies

from easyaira.config.ranges import bytes_of
from easyaira.config.run import DryRun
from easyaira.distributed import cards, chips, hosts
from easyaira.errors import ConfigError, WeightsError
from easyaira.plan import cost, counted, smaller
from easyaira.plan.search import candidates
from easyaira.run.run import run
from easyaira.train.setup import prepare
from helpers import runs, tiny


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Models of two and four layers without weights, and rows."""
    two = tiny.CONFIGS["llama"]
    models = {"two": two, "four": two | {"num_hidden_layers": 4}}
    rows = {"sft": tiny.sft_rows(40), "dpo": tiny.dpo_rows(40)}
    return tiny.ground(tmp_path_factory.mktemp("ground"), bare=models, **rows)


def planned(ground, task="sft", model="two", **options):
    return runs.configure(task, ground / model, ground, ground / "out", max_steps=4, **options)


@pytest.mark.parametrize("name", cards.CARDS)
def test_a_card_has_its_makers_figures(name):
    chip, (device,) = chips.chip_of(cards.CARDS[name].kind), cards.absent(cards.CARDS[name])
    assert chips.memory_of(device) == chip.memory
    digits = {"a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "mi300x": 192}
    assert chip.memory == pytest.approx(digits.get(name, chip.memory / 1e9) * 1e9)


def test_a_card_with_a_longer_name_is_another_one():
    assert chips.chip_of("NVIDIA GeForce RTX 3060 Ti") is None
    assert chips.chip_of("NVIDIA L40S") is None
    assert chips.chip_of("NVIDIA GeForce RTX 3060").memory == 12e9


def test_numbers_of_cards(monkeypatch):
    monkeypatch.setattr(cards.importlib.util, "find_spec", lambda name: None)
    assert [device.id for device in cards.machine("h100:8")] == list(range(8))
    assert cards.machine("v5p:4x4x2") is None
    for wrong in ("h100:0", "h100:", "h100:2x4"):
        with pytest.raises(ConfigError, match="expected a number of cards, such as h100:8"):
            cards.machine(wrong)


@pytest.mark.parametrize(
    ("billed", "sides"),
    [
        ("v5p-64", "v5p:4x4x2"),
        ("v4-8", "v4:2x2x1"),
        ("v3-256", "v3:8x16"),
        ("v5litepod-8", "v5e:2x4"),
        ("v6e-16", "v6e:4x4"),
        ("v5p-65", "v5p-65"),
        ("v5p-48", "v5p-48"),
        ("v5p:2x2x1", "v5p:2x2x1"),
    ],
)
def test_names_on_the_bill_are_pods(billed, sides):
    assert chips.sides_of(billed) == sides


def test_sizes_of_memory():
    sizes = {"12GiB": 12 * 2**30, "12 GB": 12e9, "1.5GiB": 1.5 * 2**30, "800MB": 8e8}
    assert {size: bytes_of(size) for size in sizes} == sizes
    for wrong in ("12", "0GiB", "-1GiB", "GiB", "12gib"):
        with pytest.raises(ConfigError, match="--memory: expected a size such as 12GiB, got"):
            bytes_of(wrong)


@pytest.mark.parametrize(("card", "dtype"), [("t4", "float32"), ("rtx3060", "bfloat16")])
def test_the_computing_type_is_one_that_the_card_has(card, dtype, ground):
    config, algorithm = planned(ground)
    setup = prepare(config, algorithm, cards.absent(cards.CARDS[card]), planned=True)
    assert setup.model.compute.dtype.name == dtype


def test_layers_that_are_recomputed_keep_their_input(ground):
    """Two more layers keep two more arrays of [rows, tokens, width], in 16 bits."""
    sizes, options = {}, {"model.gradient_checkpointing": "full"}
    for model in ("two", "four"):
        config, algorithm = planned(ground, "dpo", model, **options)
        setup = prepare(config, algorithm, cards.absent(cards.CARDS["h100"]), planned=True)
        update = cost.largest_update(setup, algorithm)
        sizes[model] = counted.kept_bytes(setup, algorithm, update.batch)
    width = setup.model.config.width
    assert sizes["four"] - sizes["two"] == 2 * update.rows * update.length * width * 2


def test_a_count_divides_by_devices_and_grows_with_what_is_kept(ground):
    counts = {}
    for number, kept in ((1, "none"), (1, "full"), (4, "none")):
        config, algorithm = planned(ground, **{"model.gradient_checkpointing": kept})
        devices = cards.absent(cards.CARDS["h100"], number)
        setup = prepare(config, algorithm, devices, planned=True)
        counts[number, kept] = cost.measure(setup, algorithm).program
    assert all(program.counted for program in counts.values())
    assert counts[1, "full"].temporaries < counts[1, "none"].temporaries
    assert counts[4, "none"].memory < counts[1, "none"].memory / 2


@pytest.mark.slow
def test_a_plan_needs_no_weights_and_says_what_would_fit(ground, capsys):
    assert not list((ground / "two").glob("*.safetensors"))
    config, algorithm = planned(ground, "dpo")
    with jax.default_matmul_precision("default"):
        run(config, algorithm, dry_run=DryRun(memory=2**14))
    out = capsys.readouterr().out
    assert "counting the memory of the largest update, as no compiler for GPU is installed" in out
    assert re.search(r"does not fit: about 0\.\d+ GiB of 0\.00 GiB", out)
    flags = ["gradient_checkpointing full", "gradient_accumulation_steps 8", "state_dtype 8bit"]
    flags += ["lora.r 16", "nf4"]
    places = [out.index(flag) for flag in flags]
    assert places == sorted(places) and out.rstrip().endswith("larger devices")


def test_a_search_without_a_known_chip_ends_before_the_plan(ground, monkeypatch):
    monkeypatch.setattr(cost, "measure", lambda *_: pytest.fail("planned"))
    config, algorithm = planned(ground)
    with pytest.raises(ConfigError, match="search: the chip cpu is unknown"):
        run(config, algorithm, dry_run=DryRun(search=True))


def test_options_that_save_nothing_are_not_proposed(ground, monkeypatch):
    """One example in micro-batches of its own: the copy of the gradients costs more than it saves;
    with adapters, whose gradients are small, it saves."""
    sizes = {"----": 9, "x---": 10, "-x--": 6, "-xx-": 5, "xxx-": 4, "xxxx": 3}
    asked = []

    def needed(config, *_):
        on = [config.gradient_accumulation_steps > 1, config.optimizer.state_dtype == "8bit"]
        on += [config.lora, config.lora and config.lora.quantize]
        asked.append("".join("x" if one else "-" for one in on))
        return sizes[asked[-1]] * 2.0**30

    monkeypatch.setattr(smaller, "_needed", needed)
    config, algorithm = planned(ground)
    setup = prepare(config, algorithm, cards.absent(cards.CARDS["h100"]), planned=True)
    proposed = list(smaller.smaller(setup, algorithm, 3 * 2**30))
    assert asked == list(sizes)
    words = ["full: about 9", "8bit: about 6", "32: about 5", "8: about 4", "nf4: about 3"]
    assert len(proposed) == 5 and all(w in line for w, line in zip(words, proposed, strict=True))
    assert "accumulation_steps" in proposed[3] and proposed[-1].endswith("which fits")


RATED = [{"prompt": f"who {i}?", "completion": "yes", "label": i % 2} for i in range(40)]
ONLINE = {
    "rl.algorithm": "online_dpo",
    "rl.reward": "easyaira.rewards.rules:concise",
    "rl.max_completion_length": 40,
}
IN_GROUPS = {
    "kto": ("dpo", {"dpo.loss_type": "kto", "dpo.kto_group": 4, "train_batch_size": 16}, 4),
    "online": ("rl", ONLINE | {"train_batch_size": 8}, 4),
    "random": ("sft", {"model.init": "random"}, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_GROUPS)
def test_what_is_proposed_is_a_run(name, ground, tmp_path, capsys):
    """Examples that belong together stay so, and random weights have no adapters."""
    task, options, most = IN_GROUPS[name]
    rows = RATED if name == "kto" else tiny.sft_rows(40)
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    common = task, ground / "two", data, tmp_path / "out"
    config, algorithm = runs.configure(*common, max_steps=4, **options)
    with jax.default_matmul_precision("default"):
        run(config, algorithm, dry_run=DryRun(memory=2**14))
    _, proposed = capsys.readouterr().out.split("to fit, counted:\n")
    lines = [line for line in proposed.splitlines() if " --" in line]
    assert len(lines) > 2 and all("GiB" in line for line in lines), proposed
    needed = [float(re.search("about (.*) GiB", line)[1].replace(",", "")) for line in lines]
    assert needed == sorted(needed, reverse=True)
    assert f"--gradient_accumulation_steps {most}:" in proposed
    assert ("--lora" in proposed) == (name != "random")
    setup = prepare(config, algorithm, planned=True)
    accumulations = {one.setup.batches.accumulation for one in candidates(setup, algorithm)}
    assert max(accumulations) == most


def test_adapters_are_planned_without_weights(ground, capsys):
    options = {"lora.target_modules": "all-linear", "lora.quantize": "nf4"}
    config, algorithm = planned(ground, **options)
    run(config, algorithm, dry_run=DryRun("v100:2"))
    out = capsys.readouterr().out
    assert "\nfits: about" in out and "on 2 x Tesla V100-SXM2-16GB" in out
    assert "warning: Tesla V100-SXM2-16GB has no bfloat16; float32" in out
    assert re.search(r"cost    at most about [\d.e-]+ device hours \(estimate\): 4 updates", out)
    with pytest.raises(WeightsError, match="no model.safetensors"):
        prepare(replace(config, lora=None), algorithm)


def test_a_plan_for_gpus_needs_none_here(ground, monkeypatch):
    """With JAX's CUDA plugin but no driver: the plugin must not check for one. Flags are set before
    JAX looks for devices, since the plugin of JAX 0.12 reads them then; and they are those that
    this version of XLA knows, as an unknown one ends the process."""
    seen = {}

    def joined(config):
        seen["flags"] = os.environ["XLA_FLAGS"]
        return join(config)

    def compiled_for(**_):
        raise InterruptedError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    monkeypatch.setattr(topologies, "get_topology_desc", compiled_for)
    monkeypatch.setattr(jax.config, "update", lambda *option: seen.setdefault("first", option))
    started, join = cards.planned_devices, hosts.joined
    monkeypatch.setattr(hosts, "joined", joined)

    def planned_devices(*args):
        assert seen["first"] == ("jax_platforms", "cpu")
        return started(*args)

    monkeypatch.setattr("easyaira.run.run.planned_devices", planned_devices)
    for version, known in {(0, 10, 2): False, (0, 11, 0): True}.items():
        monkeypatch.setenv("XLA_FLAGS", "")
        monkeypatch.setattr(jax.version, "__version_info__", version)
        with pytest.raises(InterruptedError):
            run(*planned(ground), dry_run=DryRun("h100"))
        assert "autotune_level=0" in seen["flags"]
        assert ("deviceless" in seen["flags"]) == known
