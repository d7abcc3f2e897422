"""The plan of a run: what a compiled program says of itself, and what is made of it."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira import cli
from easyaira.config.run import DryRun, TrainSFT
from easyaira.distributed import chips
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError
from easyaira.models import llama
from easyaira.plan import cost, hlo, search
from easyaira.plan import report as plan_report
from easyaira.run.run import run
from easyaira.train.setup import prepare
from helpers import runs, tiny

WIDE = tiny.CONFIGS["llama"] | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    models = {"wide": WIDE, "one": WIDE | {"num_hidden_layers": 1}}
    rows = {"sft": tiny.sft_rows(40), "dpo": tiny.dpo_rows(40)}
    return tiny.ground(tmp_path_factory.mktemp("ground"), bare=models, **rows)


def planned(ground, task="sft", model="wide", flags=(), **options):
    """A run of four updates from random weights."""
    options = {"model.init": "random", "max_steps": 4, **options}
    return runs.configure(task, ground / model, ground, ground / "out", *flags, **options)


# --------------------------------------------------------------------------------------------------
# Programs
# --------------------------------------------------------------------------------------------------

HLO = """HloModule jit_f, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%gathers.1 (p: bf16[2,16]) -> bf16[8,16] {
  %p = bf16[2,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag = bf16[8,16]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%gathers.2 (p: bf16[2,16]) -> bf16[8,16] {
  %p = bf16[2,16]{1,0} parameter(0)
  ROOT %ag = bf16[8,16]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.3 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %ar = f32[8,16]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%ar)
}

%inner_body (t: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %t = (s32[], f32[4,4]{1,0}) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%t), index=1
  %i = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %more = s32[] add(%i, %two)
  %cp = (f32[4,4]{1,0}, f32[4,4]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done = f32[4,4]{1,0} collective-permute-done(%cp)
  ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%more, %done)
}

%inner_condition (t: (s32[], f32[4,4])) -> pred[] {
  %t = (s32[], f32[4,4]{1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(7)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (t: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %t = (s32[], f32[4,4]{1,0}) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %start = (s32[], f32[4,4]{1,0}) tuple(%one, %x)
  ROOT %w = (s32[], /*index=1*/f32[4,4]{1,0}) while(%start), condition=%inner_condition, body=%inner_body
}

%condition (t: (s32[], f32[4,4])) -> pred[] {
  %t = (s32[], f32[4,4]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%small (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%x), channel_id=5, replica_groups={}, to_apply=%sum
}

%large (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %xx = f32[64]{0} broadcast(%x), dimensions={0}
  %a = (f32[64]{0}, f32[4]{0}) all-to-all(%xx, %x), channel_id=6, replica_groups=mesh['a'=2,'b'=4] {'a'}
  ROOT %r = f32[4]{0} get-tuple-element(%a), index=1
}

ENTRY %main (w: bf16[2,16], g: f32[8,16], x: f32[4,4], y: f32[4]) -> f32[4] {
  %w = bf16[2,16]{1,0} parameter(0)
  %g = f32[8,16]{1,0} parameter(1)
  %x = f32[4,4]{1,0} parameter(2)
  %y = f32[4]{0} parameter(3)
  %f1 = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%gathers.1
  %f2 = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%gathers.2
  %f3 = f32[2,16]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]{1,0}) tuple(%zero, %x)
  %known = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %c = f32[4]{0} conditional(%zero, %y, %y), branch_computations={%small, %large}
}
"""  # noqa: E501


def test_collectives_are_counted_where_they_happen():
    totals = {}
    for c in hlo.collectives_of(HLO, loops=10):
        totals.setdefault(c.kind, []).append((c.times, c.bytes))
    assert totals == {
        # one in two pieces; a device has 64 bytes and sends what the three others miss
        "all-gather": [(1, 2 * 8 * 16 * 3 / 4)],
        "reduce-scatter": [(1, 4 * 8 * 16 * 3 / 4)],
        # 1, 3, 5 in each of five rounds, and in each of ten, where no number is known
        "collective-permute": [(15, 64), (30, 64)],
        "all-to-all": [(1, (256 + 16) / 2)],  # of both branches the one that sends more
    }


def test_collectives_of_a_program_on_eight_devices():
    """Five layers whose weights are divided: each is gathered once and kept, and its gradient is
    added up over all devices."""
    mesh = jax.make_mesh((2, 4), ("dp", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows, whole = (NamedSharding(mesh, P(*axes)) for axes in ((("dp", "fsdp"),), ()))
    divided = NamedSharding(mesh, P(None, "fsdp"))

    def loss(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return (jax.lax.scan(layer, x, w)[0] ** 2).sum()

    w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=divided)
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
    step = jax.jit(jax.grad(loss), out_shardings=divided)
    program = hlo.compiled(lambda: step.lower(w, x), loops=1)
    kinds = {c.kind: (c.times, c.shapes, c.bytes) for c in program.collectives}
    assert kinds == {
        "all-gather": (5, (("f32", (1, 32, 32)),), 4096 * 3 / 4),
        "all-reduce": (5, (("f32", (32, 32)),), 2 * 4096 * 7 / 8),
    }
    assert program.arguments == (5 * 32 * 32 / 4 + 16 * 32 / 8) * 4 and not program.rematerialized


def look_up(mesh):
    """A lookup in a table that is divided as nobody wants the result."""
    at = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731

    def f(table, ids):
        return jax.lax.with_sharding_constraint(table[ids], at(("dp", "fsdp"), None, None))

    table = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=at("tp", "fsdp"))
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=at(("dp", "fsdp")))
    return jax.jit(f).lower(table, ids)


def test_an_array_that_is_gathered_to_be_moved_is_noticed():
    warning = (
        "W0101 spmd_partitioner.cc:635] [SPMD] Involuntary full rematerialization. The compiler "
        "cannot go from sharding {devices=[4]} to {devices=[2]} efficiently for HLO operation "
        "%gather = f32[8,16]{1,0} gather(%x), and so on.\n"
    )
    lowered = jax.jit(lambda x: x + 1).lower(1.0)

    class Warned:
        def compile(self):
            os.write(2, warning.encode())  # as XLA does, whatever Python's standard error is
            return lowered.compile()

    program = hlo.compiled(Warned, loops=1)
    assert len(program.rematerialized) == 1
    assert program.rematerialized[0].startswith("%gather = f32[8,")


@pytest.mark.parametrize(
    "message, needed",
    [
        ("Ran out of memory in memory space hbm. Used 25.50G of 15.75G hbm. Too much.", 25.5),
        ("Ran out of memory on HBM, the total (96.00G) exceeds available HBM (15.75G).", 96),
    ],
)
def test_a_program_that_the_compiler_refuses_is_no_error(message, needed):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"{status}: {message}\nmore")

    status = "RESOURCE_EXHAUSTED"
    program = hlo.compiled(Lowered, loops=1)
    assert program.memory == needed * 2**30 and program.refused == message
    status = "INTERNAL"
    with pytest.raises(ConfigError, match="dry run: XLA cannot compile this: INTERNAL: "):
        hlo.compiled(Lowered, loops=1)


# --------------------------------------------------------------------------------------------------
# Plans
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_memory_is_for_adds_up_to_what_the_compiler_says(ground, devices):
    devices(8)
    options = {"mesh": "dp=2,fsdp=2,tp=2", "gradient_accumulation_steps": 2}
    config, algorithm = planned(ground, "dpo", **options)
    setup = prepare(config, algorithm)
    plan = cost.measure(setup, algorithm)
    rows = {name: size for name, (size, _) in plan_report.split(plan).items()}
    assert sum(rows.values()) == plan.program.memory and min(rows.values()) >= 0
    held = setup.model.parameter_count() * 4 / 4  # float32, over fsdp x tp
    assert rows["weights"] == pytest.approx(held, rel=0.05)
    assert rows["optimizer"] == pytest.approx(2 * rows["weights"], rel=1e-3)
    assert rows["gradients"] == 2 * rows["weights"]  # of a micro-batch, and of those before it
    assert not plan.failures
    text = plan_report.show(setup, plan, None)
    assert "fits" not in text and "(this device's memory is unknown)" in text
    assert "2 micro-batches x 4 data shards x" in text


@pytest.mark.slow
def test_operations_are_those_that_the_compiler_counts(ground):
    """Of one layer: the compiler counts a loop's body once."""
    config, algorithm = planned(ground, model="one", train_batch_size=32)
    setup = prepare(config, algorithm)
    update = cost.largest_update(setup, algorithm)
    counted = cost.lower_step(setup, algorithm, update.batch).compile().cost_analysis()["flops"]
    work = cost.work_of(setup, update, reference_in_step=False)
    assert update.chunks == 1
    assert sum(work.values()) == pytest.approx(counted, rel=0.04)


@pytest.mark.slow
def test_runs_that_differ_in_rate_schedule_and_length_share_a_program(ground):
    others = {
        "optimizer.learning_rate": 1e-3,
        "optimizer.lr_scheduler_type": "cosine",
        "optimizer.warmup_steps": 2,
        "max_steps": 8,
    }

    def program(**options):
        config, algorithm = planned(ground, model="one", **options)
        setup = prepare(config, algorithm)
        batch = cost.largest_update(setup, algorithm).batch
        return cost.lower_step(setup, algorithm, batch).as_text()

    assert program() == program(**others)
    assert program() != program(**{"optimizer.weight_decay": 0.2})


@pytest.mark.slow
def test_weights_that_are_not_divided_or_gathered_all_at_once_are_failures(ground, devices):
    devices(4)
    setup = prepare(*planned(ground, mesh="fsdp=2,tp=2"))
    path, shape = "model/layers/mlp/up_proj/kernel", (2, 256, 512)

    def gathered(*sizes):
        one = hlo.Collective("all-gather", 1, (("bf16", sizes),), 1.0)
        return cost.failures(setup, hlo.Program(1.0, collectives=[one]))

    assert gathered(1, 256, 256) == []  # of a layer, and of one device of tp
    assert gathered(2, 256, 256) == [f"{path} is gathered for all layers at once: (2, 256, 256)"]
    architecture = setup.model.architecture
    rules = ((r"up_proj/kernel$", P()), *llama.PARTITION_RULES)
    model = replace(setup.model, architecture=replace(architecture, rules=rules))
    setup = replace(setup, model=model)
    assert gathered() == [f"{path} {shape} is not sharded, although fsdp x tp = 4"]


@pytest.mark.slow
def test_search_proposes_what_fits(ground, devices, monkeypatch):
    """With a stand-in for the compiler, which takes what must be kept for what is needed."""
    devices(2)
    config, algorithm = planned(ground, train_batch_size=2)
    setup = prepare(config, algorithm)

    def measure(setup, algorithm):
        update = cost.largest_update(setup, algorithm)
        sizes = cost.sizes_of(setup, algorithm, update)
        needed = sum(sizes.values()) + 1.5 * search.kept_bytes(setup, update)
        return cost.Plan(update, sizes, {}, hlo.Program(1.0, arguments=int(needed)), [])

    def lines(memory):
        monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(1e9, memory, 1e9, 1e8))
        return list(search.search(setup, algorithm, memory))

    def needed(proposed):
        flags = proposed.removeprefix("propose ").split()
        config, _ = planned(ground, train_batch_size=2, flags=flags)
        return measure(prepare(config, algorithm), algorithm).program.memory

    monkeypatch.setattr(cost, "measure", measure)
    _, *table, tried, proposed = lines(1e12)
    assert any(line.endswith("(as given)") for line in table)
    seconds = [float(line.split()[1]) for line in table[1:]]
    assert seconds == sorted(seconds)
    assert "gradient_checkpointing none" in tried and "; fits: " in tried
    fastest = needed(proposed)
    _, *rest, proposed = lines(fastest - 1)
    tried = [line for line in rest if line.startswith("search")]
    assert all("does not fit" in line for line in tried[:-1]) and "; fits: " in tried[-1]
    assert needed(proposed) < fastest
    with pytest.raises(ConfigError, match="nothing fits"):
        lines(1e6)


@pytest.mark.parametrize("name", ["v9:2x2", "v5p:4x4", "v5e:8x8x8", "v5p", "v5e:8x", "v4:4x4x2:2"])
def test_an_unknown_pod_is_refused_with_those_that_are_known(name):
    with pytest.raises(ConfigError, match="is not known; use for example v3:8x16, v4:4x4x2"):
        chips.pod(name)


def test_a_missing_compiler_is_said(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(
        ConfigError, match=r'needs libtpu \(on any machine\); pip install "jax\[tpu\]"'
    ):
        chips.pod("v5e:2x4")


def test_flags_that_plan_instead_of_training(ground):
    needed = [f"--model.name_or_path={ground / 'wide'}", "--data.train=x.jsonl"]
    assert cli.parse(TrainSFT, needed)[1] is None
    assert cli.parse(TrainSFT, [*needed, "--dry_run"])[1] == DryRun()
    assert cli.parse(TrainSFT, [*needed, "--search"])[1] == DryRun(search=True)
    asked = cli.parse(TrainSFT, [*needed, "--topology", "v5p:4x4x2"])[1]
    assert asked == DryRun("v5p:4x4x2")


def test_kinds_of_chips_are_told_apart():
    assert chips.chip_of("TPU v5 lite").flops == 197e12
    assert chips.chip_of("TPU v5").flops == chips.chip_of("TPU v5p").flops == 459e12
    assert chips.chip_of("NVIDIA A100-SXM4-80GB").memory == 80e9
    assert chips.chip_of("cpu") is None


# --------------------------------------------------------------------------------------------------
# Pods that are not there
# --------------------------------------------------------------------------------------------------


def test_old_chips_have_no_kernel_for_attention(ground):
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed")
    config, algorithm = planned(ground)
    setup = prepare(config, algorithm, chips.pod("v3:2x2"))
    assert setup.model.compute.attention == "xla" and setup.mesh.size == 8  # two cores a chip


def test_the_tpu_compiler_warns_of_arrays_that_it_gathers():
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed")
    mesh = meshes.make_mesh("2,2,2", chips.pod("v5e:2x4"))
    assert hlo.compiled(lambda: look_up(mesh), loops=1).rematerialized


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tp=2", "dp=2,fsdp=2,tp=2"])
def test_two_layers_of_llama_compile_for_a_pod(mesh, ground, capsys):
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed")
    options = {"mesh": mesh, "model.gradient_checkpointing": "full"}
    config, algorithm = planned(ground, "dpo", **options)
    asked = DryRun("v5e:2x4")
    with pytest.raises(ConfigError, match="there are 8"):
        run(replace(config, mesh="dp=3"), algorithm, dry_run=asked)
    with jax.default_matmul_precision("default"):  # tests ask for the highest; bfloat16 has none
        run(config, algorithm, dry_run=asked)
    out = capsys.readouterr().out
    assert "attention by splash, on 8 x TPU v5 lite" in out and "\nfits: " in out
    assert "all-gather" in out or "collective-permute" in out
    assert "\nfailure" not in out, out
