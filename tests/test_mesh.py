"""Mesh forms, how devices of several hosts lie on it, and partition rules that cover every
parameter."""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import easyaira
from easyaira import cli
from easyaira.config.run import DistributedConfig
from easyaira.distributed import hosts as processes
from easyaira.distributed import mesh as meshes
from easyaira.distributed import sharding as placement
from easyaira.distributed.compiler import keep_order
from easyaira.distributed.sharding import constrain, partition_specs, shardings
from easyaira.errors import ConfigError, WeightsError
from easyaira.losses.token_logps import token_nll
from easyaira.models.layers import Compute
from easyaira.models.model import resize
from easyaira.models.registry import model_of
from easyaira.storage import pretrained
from helpers import tiny

# families whose layers are parts of others': Gemma 2 has their windows, GPT-NeoX their biases, and
# layers without a rotation are those of BLOOM
OF_OTHERS = {"mistral", "qwen2", "smollm3"}


def test_a_cpus_devices_run_collectives_in_one_order(monkeypatch):
    """In different orders, a third of such runs deadlocked. XLA reads its flags when JAX starts."""
    option = "--xla_cpu_enable_concurrency_optimized_scheduler"
    assert f"{option}=false" in os.environ["XLA_FLAGS"]  # in these tests

    def started(*_):
        assert os.environ["XLA_FLAGS"] == f"{option}=false"
        raise InterruptedError

    monkeypatch.setattr(processes, "_connect", started)
    monkeypatch.setattr(pretrained, "find", started)
    begins = (
        lambda: processes.joined(DistributedConfig()).__enter__(),  # a run
        lambda: cli.run_command(started, []),  # any other command
        lambda: easyaira.load("folder"),
    )
    for begin in begins:
        monkeypatch.setenv("XLA_FLAGS", "")
        with pytest.raises(InterruptedError):
            begin()
    for given, wanted in {"--a=1": f"--a=1 {option}=false", f"{option}=true": None}.items():
        monkeypatch.setenv("XLA_FLAGS", given)
        keep_order()
        assert os.environ["XLA_FLAGS"] == (wanted or given)


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("dp=1,fsdp=-1,tp=1", (1, 8, 1)),
        ("1,-1,1", (1, 8, 1)),
        ("-1,2,2", (2, 2, 2)),
        ("2,2,2", (2, 2, 2)),
        ("dp:1,fsdp:-1,mp:2", (1, 4, 2)),
        ("tp=8", (1, 1, 8)),
        ("tp = 2, dp = -1", (4, 1, 2)),
    ],
)
def test_forms(text, sizes):
    assert tuple(meshes.parse_mesh(text, 8).values()) == sizes


@pytest.mark.parametrize(
    "text",
    ["dp=3", "fsdp=-1,tp=3", "2,2", "2,2,3", "-1,-1,1", "dp=0,fsdp=8", "x=8", "8", "", "dp=8,dp=1"],
)
def test_what_does_not_fit_says_how_many_devices_there_are_or_how_to_write_it(text):
    with pytest.raises(ConfigError, match="8|-1|dp") as error:
        meshes.parse_mesh(text, 8)
    assert "\n" not in str(error.value)


class Device(SimpleNamespace):
    """What a mesh is told of a device that is not there."""

    __hash__ = object.__hash__


def fake(place: int, each: int, platform: str, **fields) -> Device:
    """One of several hosts' devices; `more` says what is known of its place."""
    known = {name: value(place // each) for name, value in fields.items()}
    known = {"process_index": place // each} | known
    return Device(id=place, platform=platform, device_kind=platform, **known)


def hosts(count: int, each: int, platform: str = "gpu", **fields) -> list[Device]:
    """Their devices, in no order."""
    order = np.random.default_rng(0).permutation(count * each)
    return [fake(int(place), each, platform, **fields) for place in order]


def slices(count: int) -> list[Device]:
    """The devices of TPU slices of 2 x 4 chips, in which a process has 4."""
    devices = []
    for place in range(8 * count):
        chip = fake(place, 4, "tpu", slice_index=lambda host: host // 2)
        chip.coords, chip.core_on_chip = (place // 4 % 2, place % 4, 0), 0
        devices.append(chip)
    return devices


def arranged(of: str, *args, **kwargs) -> list:
    """What `of` says of each device of a mesh."""
    mesh = meshes.make_mesh(*args, **kwargs)
    assert mesh.axis_names == meshes.AXES and len({d.id for d in mesh.devices.flat}) == mesh.size
    return np.vectorize(lambda device: getattr(device, of))(mesh.devices).tolist()


def per_slice(host: int) -> int:
    return host


@pytest.mark.parametrize("fields", [{}, {"slice_index": per_slice}, {"slice_index": lambda _: 0}])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_neighbours_along_tp_share_a_host(platform, fields):
    """Where each host is a slice, as GPUs of several hosts are; where nothing says so; and where
    all are one."""
    two = hosts(2, 4, platform, **fields)
    one, other = [[0, 0], [0, 0]], [[1, 1], [1, 1]]
    assert arranged("process_index", "fsdp=-1,tp=2", two) == [one + other]
    assert arranged("process_index", "dp=2,fsdp=-1,tp=2", two) == [one, other]
    assert arranged("process_index", "dp=2,fsdp=-1,tp=2", two, "dp=2") == [one, other]
    across = [[0, 0], [1, 1]]
    assert arranged("process_index", "dp=2,fsdp=2,tp=2", two, "fsdp=2") == [across, across]
    assert arranged("process_index", "1,4,2", two, "1,-1,1") == [one + other]


def test_tp_over_hosts_is_refused_where_their_network_is_slow():
    for fields in ({}, {"slice_index": per_slice}):
        with pytest.raises(ConfigError, match="tp=8 .* each host has 4 .* tp=1, tp=2, tp=4$"):
            meshes.make_mesh("tp=8", hosts(2, 4, **fields))
        with pytest.raises(ConfigError, match="tp=4 .* each host has 6 .* tp=1, tp=2, tp=3, tp=6$"):
            meshes.make_mesh("tp=4,fsdp=-1", hosts(2, 6, **fields))
        with pytest.raises(ConfigError, match="tp=8 .* each host has 4"):
            meshes.make_mesh("tp=8,dp=2", hosts(4, 4, **fields))
    meshes.make_mesh("tp=8", hosts(8, 1, slice_index=lambda _: 0))  # a process for each GPU
    meshes.make_mesh("tp=8", slices(1))
    meshes.make_mesh("1,-1,8", slices(2), "fsdp=2")


def test_a_mesh_over_tpu_slices():
    with pytest.raises(ConfigError, match="dcn: .* 2 TPU slices.* dp=2$"):
        meshes.make_mesh("fsdp=-1", slices(2))
    for text, dcn in (("dp=2,fsdp=-1", "dp=2"), ("2,4,2", "dp=2"), ("4,2,2", "2,1,1")):
        ids = arranged("slice_index", text, slices(2), dcn)
        half = len(ids) // 2
        assert {*np.ravel(ids[:half])} == {0} and {*np.ravel(ids[half:])} == {1}
    ids = np.array(arranged("slice_index", "dp=4,fsdp=8", slices(4), "dp=2,fsdp=2"))[:, :, 0]
    assert [ids[i, j] for i in (0, 2) for j in (0, 4)] == [0, 1, 2, 3]
    assert all(len({*np.ravel(ids[i : i + 2, j : j + 4])}) == 1 for i in (0, 2) for j in (0, 4))


@pytest.mark.parametrize(
    "text, dcn, message",
    [
        ("dp=2,fsdp=-1", "dp=4", "asks for 4 hosts, but there are 2"),
        ("fsdp=-1", "dp=2", "dp=2 does not divide dp=1 of mesh"),
        ("dp=2,fsdp=-1", "tp=2", "'tp=2' puts tp on the slow network; use dp or fsdp"),
        ("dp=2,fsdp=-1", "two", "dcn: cannot read 'two'"),
        ("dp=2,fsdp=-1", "dp=-2", "dcn: 'dp=-2' has an axis of size -2"),
    ],
)
def test_what_does_not_fit_the_network_is_named(text, dcn, message):
    with pytest.raises(ConfigError, match=f"^dcn: .*{message}|^{message}") as error:
        meshes.make_mesh(text, hosts(2, 4), dcn)
    assert "\n" not in str(error.value)


def test_dcn_is_for_several_slices_or_alike_hosts():
    with pytest.raises(ConfigError, match="dcn: needs several TPU slices, but there is one"):
        meshes.make_mesh("dp=2,fsdp=-1", slices(1), "dp=2")
    with pytest.raises(ConfigError, match=r"dcn: hosts differ in number of devices: \[2, 4\]"):
        meshes.make_mesh("fsdp=-1", [fake(place, 4, "gpu") for place in range(6)], "fsdp=2")


def test_the_parts_of_a_batch_that_a_process_holds(monkeypatch):
    """They are those that its devices are given by a batch's sharding."""
    held = {}
    for host in (0, 1):
        monkeypatch.setattr(placement.jax, "process_index", lambda host=host: host)
        for text, dcn in (("2,2,2", "dp=2"), ("2,2,2", "fsdp=2"), ("2,2,2", None), ("8,1,1", None)):
            held[host, text, dcn] = meshes.local_shards(meshes.make_mesh(text, hosts(2, 4), dcn))
    assert held[0, "2,2,2", "dp=2"] == [0, 1] and held[1, "2,2,2", "dp=2"] == [2, 3]
    assert held[0, "2,2,2", "fsdp=2"] == [0, 2] and held[1, "2,2,2", "fsdp=2"] == [1, 3]
    assert held[0, "2,2,2", None] == [0, 1] and held[1, "8,1,1", None] == [4, 5, 6, 7]
    monkeypatch.undo()
    wide = hosts(2, 1, slice_index=lambda _: 0)  # one tp group in two processes: both read its rows
    assert meshes.local_shards(meshes.make_mesh("tp=2", wide)) == [0]


def test_parts_are_counted_as_a_batch_is_divided(devices):
    devices(8)
    mesh = meshes.make_mesh("2,2,2")
    rows = jax.device_put(np.arange(4), jax.NamedSharding(mesh, P(meshes.BATCH_AXES)))
    place = {shard.device: int(shard.data[0]) for shard in rows.addressable_shards}
    parts = mesh.devices.reshape(meshes.data_shards(mesh), -1)
    assert [{place[device] for device in part} for part in parts] == [{0}, {1}, {2}, {3}]
    assert meshes.local_shards(mesh) == [0, 1, 2, 3]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(kind, tied):
    model = model_of(tiny.CONFIGS[kind] | {"tie_word_embeddings": tied}, "here")
    specs = partition_specs(model.shapes, model.rules)
    divided = [
        spec for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)) if any(spec)
    ]
    assert len(divided) > 5
    with pytest.raises(WeightsError, match="without a parameter.*nothing"):
        partition_specs(model.shapes, (*model.rules, ("nothing$", P())))
    with pytest.raises(WeightsError, match="without a rule.*embedding"):
        partition_specs(model.shapes, model.rules[1:])


def test_a_mesh_that_does_not_divide_a_parameter_is_an_error(devices):
    devices(3)
    model = model_of(tiny.CONFIGS["gpt2"], "here")
    with pytest.raises(ConfigError, match="fsdp.*3 does not divide 16"):
        shardings(model.shapes, model.rules, meshes.make_mesh("fsdp=3"))


@pytest.mark.parametrize("vocab_size", [300, 321, 50257, 32001])
def test_any_vocabulary_divides_over_any_mesh(vocab_size, devices):
    devices(8)
    for kind in tiny.CONFIGS:
        model = model_of(tiny.CONFIGS[kind] | {"vocab_size": vocab_size}, "here")
        for mesh in ("tp=2,fsdp=4", "fsdp=8", "tp=4,dp=2"):
            shardings(model.shapes, model.rules, meshes.make_mesh(mesh))


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_fsdp_divides_the_bytes_of_weights_and_optimizer(kind, devices):
    from easyaira.config.algorithms import OptimizerConfig
    from easyaira.train import optimizer
    from easyaira.train.step import init_state

    tx = optimizer.make_optimizer(OptimizerConfig())
    held = {}
    for count in (1, 8):
        devices(count)
        mesh = meshes.make_mesh("fsdp=-1")
        model = model_of(tiny.CONFIGS[kind], "here")
        target = shardings(model.shapes, model.rules, mesh)
        params = jax.tree.map(
            lambda leaf, place: jax.device_put(np.zeros(leaf.shape, leaf.dtype), place),
            *(model.shapes, target),
        )
        state = init_state(params, tx, mesh)
        first = jax.devices()[0]
        held[count] = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == first
        )
    whole_norms = 0.2  # norms and biases are small at real sizes, and not divided
    assert held[8] < held[1] * (1 / 8 + whole_norms)


@pytest.fixture
def never_cached():
    """What the compiler says is said when it compiles."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, text",
    [
        ("gpt2", "fsdp=2,tp=4"),
        ("llama-3.1", "2,2,2"),
        ("qwen3", "2,2,2"),
        ("mixtral", "2,2,2"),
        ("gemma3", "2,2,2"),
        ("opt-350m", "2,2,2"),
        ("bert", "1,2,4"),
    ],
)
def test_activations_are_divided_by_tokens_and_parameters_stay_where_they_are(
    kind, text, devices, never_cached, capfd
):
    devices(8)
    mesh = meshes.make_mesh(text)
    compute = Compute(gradient_checkpointing="full")
    model = model_of({**tiny.SCORERS, **tiny.CASES}[kind], "here", compute)
    rows = jax.NamedSharding(mesh, P(meshes.BATCH_AXES, None))
    batch = jax.device_put(tiny.layout(np.zeros((8, 48), np.int32)), rows)

    def loss(params):
        if model.scorer:
            return model.score(params, batch, examples=8, answers=1)[0].sum()
        hidden, head = model.apply(params, batch)
        return token_nll(hidden, head, batch["tokens"], **model.head_options)[0]

    def step(params):
        return jax.tree.map(jnp.subtract, params, jax.grad(loss)(params))

    target = model.target(mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(target).compile()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    shards, tp = meshes.data_shards(mesh), mesh.shape["tp"]
    layers = {**tiny.SCORERS, **tiny.CASES}[kind].get("num_hidden_layers", 2)
    kept = f"f32[{layers},{8 // shards},{48 // tp},16]"  # what each layer began with
    assert kept in compiled.as_text()
    assert f"f32[{layers},{8 // shards},48,16]" not in compiled.as_text()
    for leaf, sharding in zip(
        jax.tree.leaves(target), jax.tree.leaves(compiled.output_shardings), strict=True
    ):
        assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in tiny.FAMILIES if case not in OF_OTHERS])
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(case, devices):
    devices(8)
    model = model_of(tiny.CASES[case], "here")
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2, 0]], [9, 5, 2], axis=1)
    positions = np.concatenate([np.arange(9), np.arange(5), np.arange(2)])
    whole = [np.broadcast_to(x, (8, 16)) for x in (segments, positions)]
    batch = tiny.layout(
        rng.integers(0, tiny.VOCAB, (8, 16)), segment_ids=whole[0], positions=whole[1]
    )
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), model.shapes
    )

    def loss(params, batch):
        hidden, head = model.apply(params, batch)
        sizes = model.head_options
        return token_nll(hidden, head, batch["tokens"], batch["segment_ids"] > 0, **sizes)[0] / 112

    wanted, wanted_grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = meshes.make_mesh("2,2,2")
    rows = jax.NamedSharding(mesh, P(meshes.BATCH_AXES, None))
    divided = jax.device_put(params, shardings(model.shapes, model.rules, mesh))
    with jax.set_mesh(mesh):
        value, grads = jax.jit(jax.value_and_grad(loss))(divided, jax.device_put(batch, rows))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted_grads))
    for one, other in zip(*map(jax.tree.leaves, (wanted_grads, grads)), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * largest)


def test_constrain_leaves_alone_what_does_not_divide(devices):
    devices(8)
    mesh = meshes.make_mesh("fsdp=8")
    with jax.set_mesh(mesh):
        three = jax.jit(lambda x: constrain(x, "fsdp", None))(np.ones((3, 2)))
        eight = jax.jit(lambda x: constrain(x, "fsdp", None))(np.ones((8, 2)))
    assert three.shape == (3, 2)
    assert eight.sharding.shard_shape((8, 2)) == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mean", "normal"])
@pytest.mark.parametrize("size", [301, 290, 385])
def test_a_vocabulary_of_another_size_is_the_same_on_every_mesh(size, how, devices):
    """Writing into a slice of a table that is divided over tp once lost the row at its edge."""
    devices(8)
    key = jax.random.key(0)
    model = model_of(tiny.CONFIGS["llama"], "config.json")
    params = jax.jit(model.init)(key)
    models = []

    def of_size(params):
        larger, changed = resize(model, params, size, how, key)
        models.append(larger)
        return changed

    wanted = jax.jit(of_size)(params)
    larger = models[0]
    for text in ("fsdp=8", "dp=2,fsdp=2,tp=2"):
        mesh = meshes.make_mesh(text)
        places = shardings(larger.shapes, larger.rules, mesh)
        divided = jax.device_put(params, shardings(model.shapes, model.rules, mesh))
        change = jax.jit(of_size, out_shardings=places)
        with jax.set_mesh(mesh):
            changed = change(divided)
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(changed), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
