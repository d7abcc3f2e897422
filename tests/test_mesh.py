"""Mesh forms, and partition rules that cover every parameter."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from easyaira import mesh as meshes
from easyaira.errors import ConfigError, WeightsError
from easyaira.models.registry import model_of, resize


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(kind, tied):
    model = model_of(tiny.CONFIGS[kind] | {"tie_word_embeddings": tied}, "here")
    specs = meshes.partition_specs(model.shapes, model.rules)
    divided = [
        spec for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)) if any(spec)
    ]
    assert len(divided) > 5
    with pytest.raises(WeightsError, match="without a parameter.*nothing"):
        meshes.partition_specs(model.shapes, (*model.rules, ("nothing$", P())))
    with pytest.raises(WeightsError, match="without a rule.*embedding"):
        meshes.partition_specs(model.shapes, model.rules[1:])


def test_a_mesh_that_does_not_divide_a_parameter_is_an_error(devices):
    devices(3)
    model = model_of(tiny.CONFIGS["gpt2"], "here")
    with pytest.raises(ConfigError, match="fsdp.*3 does not divide 16"):
        meshes.shardings(model.shapes, model.rules, meshes.make_mesh("fsdp=3"))


@pytest.mark.parametrize("vocab_size", [300, 321, 50257, 32001])
def test_any_vocabulary_divides_over_any_mesh(vocab_size, devices):
    devices(8)
    for kind in tiny.CONFIGS:
        model = model_of(tiny.CONFIGS[kind] | {"vocab_size": vocab_size}, "here")
        for mesh in ("tp=2,fsdp=4", "fsdp=8", "tp=4,dp=2"):
            meshes.shardings(model.shapes, model.rules, meshes.make_mesh(mesh))


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_fsdp_divides_the_bytes_of_weights_and_optimizer(kind, devices):
    from easyaira import optim, trainer
    from easyaira.config import OptimizerConfig

    config = OptimizerConfig()
    tx = optim.make_optimizer(config, optim.make_schedule(config, 10))
    held = {}
    for count in (1, 8):
        devices(count)
        mesh = meshes.make_mesh("fsdp=-1")
        model = model_of(tiny.CONFIGS[kind], "here")
        target = meshes.shardings(model.shapes, model.rules, mesh)
        params = jax.jit(model.init, out_shardings=target)(jax.random.key(0))
        state = trainer.init_state(params, tx, mesh)
        first = jax.devices()[0]
        held[count] = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == first
        )
    whole_norms = 0.2  # norms and biases are small at real sizes, and not divided
    assert held[8] < held[1] * (1 / 8 + whole_norms)


def test_constrain_leaves_alone_what_does_not_divide(devices):
    devices(8)
    mesh = meshes.make_mesh("fsdp=8")
    with jax.set_mesh(mesh):
        three = jax.jit(lambda x: meshes.constrain(x, "fsdp", None))(np.ones((3, 2)))
        eight = jax.jit(lambda x: meshes.constrain(x, "fsdp", None))(np.ones((8, 2)))
    assert three.shape == (3, 2)
    assert eight.sharding.shard_shape((8, 2)) == (1, 2)


@pytest.mark.parametrize("how", ["mean", "normal"])
@pytest.mark.parametrize("size", [301, 290, 385])
def test_a_vocabulary_of_another_size_is_the_same_on_every_mesh(size, how, devices):
    """Writing into a slice of a table that is divided over tp once lost the row at its edge."""
    devices(8)
    key = jax.random.key(0)
    model = model_of(tiny.CONFIGS["llama"], "config.json")
    params = model.init(key)
    larger, wanted = resize(model, params, size, how, key)
    kept = min(size, 300)
    table, was = (tree["model"]["embed_tokens"]["embedding"] for tree in (wanted, params))
    assert np.array_equal(table[:kept], was[:kept]) and not table[size:].any()
    if how == "mean" and size > 300:
        np.testing.assert_allclose(table[300:size] - was[:300].mean(0), 0, atol=1e-6)
    for text in ("fsdp=8", "dp=2,fsdp=2,tp=2"):
        mesh = meshes.make_mesh(text)
        places = meshes.shardings(larger.shapes, larger.rules, mesh)
        divided = jax.device_put(params, meshes.shardings(model.shapes, model.rules, mesh))
        change = jax.jit(lambda p: resize(model, p, size, how, key)[1], out_shardings=places)
        with jax.set_mesh(mesh):
            found = change(divided)
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
