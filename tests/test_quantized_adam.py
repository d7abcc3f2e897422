"""AdamW with 8-bit moments: the levels, the arithmetic, and the state of a run."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.distributed import mesh as meshes
from easyaira.storage.checkpoints import Checkpoints
from easyaira.train import optimizer, quantized_adam
from easyaira.train.quantized_adam import SIGNED, UNSIGNED
from easyaira.train.step import abstract_state, init_state
from helpers import tiny
from helpers.runs import losses_of, same_bits, train


def levels_of_bitsandbytes(signed):
    """bitsandbytes.functional.create_dynamic_map(signed), written without torch."""
    data, non_sign_bits, max_exponent_bits = [], 7, 7
    for i in range(max_exponent_bits):
        extra = non_sign_bits - max_exponent_bits + (0 if signed else 1)
        boundaries = np.linspace(0.1, 1, 2 ** (i + extra) + 1)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        data += ((10 ** (-(max_exponent_bits - 1) + i)) * means).tolist()
        if signed:
            data += (-(10 ** (-(max_exponent_bits - 1) + i)) * means).tolist()
    data += [0, 1.0]
    return np.sort(np.array(data, np.float32))


@pytest.mark.parametrize("levels", [SIGNED, UNSIGNED])
def test_levels_are_those_of_bitsandbytes_and_codes_name_the_nearest(levels):
    wanted = levels_of_bitsandbytes(levels.signed)
    assert len(wanted) == 256
    np.testing.assert_allclose(levels.levels, wanted, rtol=2e-7)
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], 20_000) if levels.signed else 1
    values = np.append(10 ** rng.uniform(-9, 0, 20_000) * signs, [0, 1, wanted[0]])
    values = np.concatenate([values, wanted, (wanted[1:] + wanted[:-1]) / 2]).astype(np.float32)
    codes = np.asarray(levels.encode(jnp.asarray(values)))
    if not levels.signed:
        assert codes.min() == 1
        wanted = np.append(np.inf, wanted[1:])
    far = np.abs(values[:, None].astype(float) - wanted.astype(float))
    chosen = np.take_along_axis(far, codes[:, None].astype(int), 1)[:, 0]
    assert (chosen <= far.min(1) + 2e-7 * np.abs(values)).all()  # rounding of middles


def blocks(x):
    """Slices of the last axis, of 256 values; the last may be shorter."""
    return [np.s_[..., i : i + 256] for i in range(0, x.shape[-1], 256)]


def decoded(codes, scale, levels):
    """Float32 values of a moment."""
    values = levels[codes]
    for i, block in enumerate(blocks(values)):
        values[block] *= scale[..., i, None]
    return values


def encoded(x, levels, first):
    """Codes and scales by comparing each value with all levels from place `first` on."""
    codes, scales = np.zeros(x.shape, np.uint8), []
    for block in blocks(x):
        scale = np.abs(x[block]).max(-1, keepdims=True)
        share = x[block] / np.where(scale > 0, scale, np.float32(1))
        codes[block] = first + np.abs(share[..., None] - levels[first:]).argmin(-1)
        scales.append(scale)
    return codes, np.concatenate(scales, -1)


@pytest.mark.parametrize("shape", [(2, 32, 300), (16, 512), (48, 96)])
def test_updates_equal_a_loop_over_blocks(shape):
    b1, b2, eps = 0.9, 0.99, 1e-8
    tx = quantized_adam.scale_by_adam(b1, b2, eps, optimizer.decays)
    state, rng = tx.init({"kernel": jnp.zeros(shape)}), np.random.default_rng(0)
    update = jax.jit(tx.update)
    signed, unsigned = levels_of_bitsandbytes(True), levels_of_bitsandbytes(False)
    for step in range(1, 5):
        grad = rng.normal(size=shape) * 10 ** rng.uniform(-4, 0, shape)
        grad = grad.astype(np.float32) * (step != 3)  # a gradient of 0 once
        before = jax.device_get(state)
        updates, state = update({"kernel": jnp.asarray(grad)}, state)
        mu = b1 * decoded(*before.mu["kernel"], signed) + (1 - b1) * grad
        nu = b2 * decoded(*before.nu["kernel"], unsigned) + (1 - b2) * grad**2
        wanted = mu / (1 - b1**step) / (np.sqrt(nu / (1 - b2**step)) + eps)
        np.testing.assert_allclose(updates["kernel"], wanted, rtol=1e-5, atol=1e-7)
        assert np.abs(wanted).max() < 20
        for held, x, levels, first in (
            (state.mu["kernel"], mu, signed, 0),
            (state.nu["kernel"], nu, unsigned, 1),
        ):
            codes, scale = encoded(x, levels, first)
            np.testing.assert_allclose(held.scale, scale, rtol=1e-6)
            off = np.abs(np.asarray(held.codes).astype(int) - codes)
            assert off.max() <= 1 and (off > 0).mean() < 1e-3  # rounding beside a middle


SHAPES = {  # by mesh axes: blocks that cross devices, blocks on one device each, float32
    "in/kernel": ((3, 64, 768), P(None, "fsdp", "tp")),
    "out/kernel": ((3, 768, 640), P(None, "tp", "fsdp")),
    "table/embedding": ((512, 320), P("tp", "fsdp")),
    "wide/kernel": ((2, 8, 4096), P(None, "tp", "fsdp")),
    "norm/scale": ((3, 4096), P()),
}
TX = quantized_adam.scale_by_adam(0.9, 0.999, 1e-8, optimizer.decays)


def gradients(count):
    """Float32 gradients of each shape, of magnitudes over three decades."""
    rng = np.random.default_rng(1)

    def one(shape):
        return (rng.normal(size=shape) * 10 ** rng.uniform(-3, 0, shape)).astype(np.float32)

    return [{name: one(shape) for name, (shape, _) in SHAPES.items()} for _ in range(count)]


def placed(mesh):
    """Shapes and shardings of the parameters, and those of the optimizer state."""
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in SHAPES.items()
    }
    return params, abstract_state(params, TX, mesh).opt_state


def compiled(mesh):
    """The program (grads, state) -> state of an update, which keeps its shardings."""
    params, target = placed(mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(
            lambda grads, state: TX.update(grads, state)[1],
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target),
        )
        return step.lower(params, target).compile()


def updated(mesh, state, grads):
    """The optimizer state after updates on a mesh; `state` None: from the start."""
    params, _ = placed(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    step, grads = compiled(mesh), [jax.device_put(grad, shardings) for grad in grads]
    if state is None:
        state = init_state(grads[0], TX, mesh).opt_state
    for grad in grads:
        state = step(grad, state)
    return state


@pytest.fixture(scope="module")
def alone():
    """The state after four updates on one device."""
    return jax.device_get(
        updated(meshes.make_mesh("fsdp=1", jax.devices()[:1]), None, gradients(4))
    )


@pytest.mark.parametrize("axes", ["fsdp=8", "fsdp=2,tp=4"])
@pytest.mark.slow
def test_a_mesh_gives_the_state_of_one_device_without_gathering_it(axes, alone):
    mesh = meshes.make_mesh(axes, jax.devices())
    state = updated(mesh, None, gradients(4))
    assert state.mu["wide/kernel"].scale.sharding.spec == P(None, "tp", "fsdp")
    assert state.mu["out/kernel"].scale.sharding.spec == P(None, "tp", None)  # they cross devices
    assert not isinstance(state.mu["norm/scale"], quantized_adam.Quantized)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        if ours.dtype == jnp.uint8:
            off = np.abs(np.asarray(ours).astype(int) - theirs)
            assert off.max() <= 1 and (off > 0).mean() < 1e-4  # rounding beside a middle
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    text = compiled(mesh).as_text()
    moved = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-|collective|reduce-scatter)", text)
    assert moved and {kind for kind, _ in moved} == {"f32"}  # no codes
    parts = {"fsdp=8": 16, "fsdp=2,tp=4": 64}[axes]  # size of parts of 640 and 768 on a device
    for _, sizes in moved:
        assert math.prod(map(int, sizes.split(","))) <= 3 * 768 * 640 // parts


@pytest.mark.slow
def test_a_state_is_saved_on_one_mesh_and_restored_on_another(tmp_path, alone):
    one = meshes.make_mesh("fsdp=1", jax.devices()[:1])
    before = updated(one, None, gradients(4)[:2])
    checkpoints = Checkpoints(tmp_path, write=True)
    checkpoints.save(2, {"a": jnp.zeros(3)}, before, {}, {})
    checkpoints.wait()
    for mesh in (one, meshes.make_mesh("fsdp=4,tp=2", jax.devices())):
        params = {"a": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=NamedSharding(mesh, P()))}
        restored = checkpoints.restore(2, params, placed(mesh)[1]).opt_state
        same_bits(jax.device_get(restored), jax.device_get(before))
        if mesh is one:
            same_bits(jax.device_get(updated(one, restored, gradients(4)[2:])), alone)
    checkpoints.close()


def test_the_state_takes_two_bytes_a_parameter():
    """Scales take 8 bytes per 256 values. Norms, biases, small and thin matrices take 8 each."""
    shapes = {"h/kernel": (16, 256, 1024), "wte/embedding": (512, 512)}
    exempt = {"h/scale": (16, 1024), "small/kernel": (16, 63, 64), "thin/kernel": (4096, 8)}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in (shapes | exempt).items()}
    state = jax.eval_shape(TX.init, params)
    for name, leaf in params.items():
        held = jax.tree.leaves((state.mu[name], state.nu[name]))
        size = sum(x.size * x.dtype.itemsize for x in held)
        assert size == leaf.size * (8 if name in exempt else 2 + 8 / 256)


@pytest.mark.slow
def test_a_short_run_ends_beside_that_of_float32(tmp_path):
    config = tiny.CONFIGS["gpt2"] | {"n_embd": 64}  # all kernels are large enough
    ground = tiny.ground(tmp_path, {"gpt2": config}, sft=tiny.sft_rows(40))
    losses = {}
    for dtype in ("float32", "8bit"):
        options = {"optimizer.state_dtype": dtype, "max_steps": 20}
        losses[dtype] = losses_of(
            train("sft", ground / "gpt2", ground, tmp_path / dtype, **options)[0]
        )
    assert losses["float32"][-1] < losses["float32"][0] - 3
    np.testing.assert_allclose(losses["8bit"], losses["float32"], atol=5e-3)  # 8e-4 was seen
    assert losses["8bit"] != losses["float32"]
