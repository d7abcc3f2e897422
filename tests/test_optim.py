"""Schedules at the points of the published recipes, the decay mask, AdamW against torch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from easyaira import cli
from easyaira.config.algorithms import OptimizerConfig
from easyaira.config.data import DataConfig
from easyaira.config.model import ModelConfig
from easyaira.config.run import TrainSFT
from easyaira.distributed.tree import path_of
from easyaira.errors import ConfigError
from easyaira.models.registry import model_of
from easyaira.train import optimizer
from easyaira.train import step as steps
from easyaira.train.adam import scale_by_adam
from easyaira.train.setup import updates
from helpers import tiny


def test_linear_points_of_tulu_dpo():
    config = OptimizerConfig(learning_rate=5e-7, warmup_ratio=0.1, lr_scheduler_type="linear")
    assert optimizer.warmup_steps(config, 5523) == 553
    rate = optimizer.make_schedule(config, 5523)
    for step, wanted in {0: 0.0, 553: 5e-7, 5523: 0.0, 553 + 2485: 2.5e-7}.items():
        assert float(rate(step)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_those_of_transformers(kind, warmup):
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" and warmup else kind
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(name, theirs, num_warmup_steps=warmup, num_training_steps=40)
    config = OptimizerConfig(learning_rate=3e-4, warmup_steps=warmup, lr_scheduler_type=name)
    ours = optimizer.make_schedule(config, 40)
    for step in range(40):
        assert float(ours(step)) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6, abs=3e-11)
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cosine_with_min_lr", "warmup_stable_decay"])
def test_schedules_with_a_floor_equal_those_of_transformers(name, floor, warmup):
    from transformers import get_scheduler

    stable = name == "warmup_stable_decay"
    given = {"num_decay_steps": 10, "min_lr_ratio": floor} if stable else {"min_lr_rate": floor}
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(
        name,
        theirs,
        num_warmup_steps=warmup,
        num_training_steps=40,
        scheduler_specific_kwargs=given,
    )
    config = OptimizerConfig(
        learning_rate=3e-4,
        warmup_steps=warmup,
        lr_scheduler_type=name,
        min_lr_rate=floor,
        decay_ratio=0.25,
    )
    ours = optimizer.make_schedule(config, 40)
    for step in range(40):
        assert float(ours(step)) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6, abs=3e-11)
        theirs.step()
        scheduler.step()


def test_a_floor_and_a_decay_that_do_not_fit_are_errors():
    with pytest.raises(ConfigError, match="min_lr_rate: cosine has none"):
        OptimizerConfig(min_lr_rate=0.1)
    config = OptimizerConfig(
        lr_scheduler_type="warmup_stable_decay", warmup_steps=6, decay_ratio=0.5
    )
    with pytest.raises(ConfigError, match="6 updates of warm-up and 5 of decay"):
        optimizer.make_schedule(config, 10)


def test_a_warm_up_as_long_as_the_run_is_an_error():
    with pytest.raises(ConfigError, match="warmup_steps"):
        optimizer.make_schedule(OptimizerConfig(warmup_steps=10), 10)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_norms_and_biases_do_not_decay(kind):
    mask = optimizer.decays(model_of(tiny.CONFIGS[kind], "here").shapes)
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        name = path_of(path)
        exempt = name.endswith(("bias", "scale"))
        assert decays != exempt, name


def test_ten_updates_equal_torch():
    rng = np.random.default_rng(0)
    start = {"a": {"kernel": rng.normal(size=(4, 3))}, "b": {"bias": rng.normal(size=(5,))}}
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    config = OptimizerConfig(
        learning_rate=1e-2, weight_decay=0.1, warmup_steps=3, max_grad_norm=0.5, adam_beta2=0.95
    )
    schedule = optimizer.on_host(optimizer.make_schedule(config, 10))
    tx = optimizer.make_optimizer(config)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(start)]
    groups = [
        {"params": theirs[:1], "weight_decay": 0.1},
        {"params": theirs[1:], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    state, params = tx.init(start), start
    for step in range(10):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), start)
        updates, state = tx.update(grads, state, params, learning_rate=schedule(step))
        params = jax.tree.map(jnp.add, params, updates)
        for parameter, grad in zip(theirs, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(np.asarray(grad))
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step))
        adamw.step()
        for ours, parameter in zip(jax.tree.leaves(params), theirs, strict=True):
            np.testing.assert_allclose(ours, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_moments_and_updates_have_the_bits_of_optax():
    rng, start = np.random.default_rng(0), {"kernel": jnp.ones((40, 30)), "bias": jnp.zeros(3)}
    ours, theirs = (f(b1=0.9, b2=0.99, eps=1e-8) for f in (scale_by_adam, optax.scale_by_adam))
    states = ours.init(start), theirs.init(start)
    for ok in (True, True, False, True):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), start)
        updates, state = jax.jit(ours.update)(grads, states[0], ok=ok)
        wanted = jax.jit(theirs.update)(grads, states[1])
        states = state, wanted[1] if ok else states[1]
        jax.tree.map(np.testing.assert_array_equal, tuple(states[0]), tuple(states[1]))
        if ok:
            jax.tree.map(np.testing.assert_array_equal, updates, wanted[0])


@pytest.mark.usefixtures("optimized")
def test_an_update_on_a_cpu_copies_no_moment_and_stores_no_quotient():
    """What reads the old moments after the new ones are known makes XLA's CPU copy them; a quotient
    that is used twice is stored."""
    tx = optimizer.make_optimizer(OptimizerConfig())
    params = {"kernel": jnp.ones((70, 50))}
    state = steps.State(jnp.int32(0), params, tx.init(params), jnp.int32(-1))

    def loss_fn(params, frozen, batch, key):
        tokens = batch["tokens"]
        return {"loss": ((params["kernel"] * tokens).sum(), tokens[0, 0])}

    step = jax.jit(steps.make_train_step(loss_fn, tx), donate_argnums=0)
    batch = {"tokens": jnp.ones((1, 70, 50))}
    compiled = step.lower(state, None, batch, None, np.float32(1e-3)).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    made = re.findall(r"= f32\[70,50\]\S* (\w+)\(", entry)
    assert made.count("parameter") == 3 and "copy" not in made
    assert made.count("fusion") <= 5  # the loss, squares, parameters and two moments


@pytest.mark.parametrize("size", [0.0, 0.1, 10.0])
def test_clipping_is_that_of_optax(size):
    grads = {"a": size * jnp.arange(3.0), "b": {"c": size * jnp.ones((2, 2))}}
    ours, theirs = (
        clip(0.5).update(grads, optax.EmptyState())[0]
        for clip in (optimizer.clip_by_global_norm, optax.clip_by_global_norm)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, theirs)


def test_a_small_rate_moves_float32_weights_by_the_analytic_amount():
    """lr 5e-7 with a constant gradient moves by lr each update; bfloat16 weights would stay."""
    config = OptimizerConfig(learning_rate=5e-7, lr_scheduler_type="constant")
    tx = optimizer.make_optimizer(config)
    schedule = optimizer.on_host(optimizer.make_schedule(config, 10))
    params = {"kernel": jnp.full((3,), 0.01)}
    state = tx.init(params)
    for step in range(10):
        grads = {"kernel": jnp.ones(3)}
        updates, state = tx.update(grads, state, params, learning_rate=schedule(step))
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(0.01 - params["kernel"], 5e-6, rtol=1e-3)


def test_a_constant_rate_has_no_warm_up():
    for warmup in ({"warmup_steps": 3}, {"warmup_ratio": 0.1}):
        with pytest.raises(ConfigError, match="use constant_with_warmup"):
            OptimizerConfig(lr_scheduler_type="constant", **warmup)


@pytest.mark.parametrize("epochs, wanted", [(1, 7), (1.5, 11), (0.1, 1), (2.01, 15)])
def test_a_part_of_an_epoch_is_rounded_up(epochs, wanted):
    """As in transformers' Trainer: ceil(num_train_epochs * updates per epoch)."""
    config = TrainSFT(ModelConfig("m"), DataConfig("d"), num_train_epochs=epochs)
    assert updates(config, 7) == wanted


@pytest.mark.parametrize("rate", ["inf", "nan", "-1e-5"])
def test_a_rate_that_is_no_finite_number_is_refused(rate):
    argv = ["--model.name_or_path", "m", "--data.train", "d", f"--optimizer.learning_rate={rate}"]
    with pytest.raises(
        ConfigError, match="optimizer.learning_rate: expected a number from 0 to 3e38"
    ):
        cli.parse(TrainSFT, argv)
