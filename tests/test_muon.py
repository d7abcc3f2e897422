"""Muon against the formula of its papers and against torch; what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easyaira import cli
from easyaira.config.algorithms import OptimizerConfig
from easyaira.config.run import TrainSFT
from easyaira.distributed.tree import by_path
from easyaira.errors import ConfigError
from easyaira.models.registry import model_of
from easyaira.train import muon, optimizer
from helpers import tiny
from helpers.runs import losses_of, train

RATE, DECAY = 1e-2, 0.1
SHAPES = {
    "layers": {
        "wide": {"kernel": (2, 4, 7), "bias": (2, 7)},
        "tall": {"kernel": (2, 9, 4)},
        "qkv": {"kernel": (2, 4, 3, 6)},
        "norm": {"scale": (2, 4)},
    },
    "embed": {"embedding": (11, 4)},
    "lm_head": {"kernel": (4, 11)},
}
HIDDEN = {"layers/wide/kernel", "layers/tall/kernel", "layers/qkv/kernel"}
DECAYS = {*HIDDEN, "embed/embedding", "lm_head/kernel"}


def draws(count):
    """Parameters, and gradients of `count` updates."""
    rng = np.random.default_rng(0)

    def draw(_):
        return jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
            SHAPES,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    start, *grads = map(draw, range(count + 1))
    return start, grads


def trained(start, grads, **options):
    """Parameters by path after each update."""
    config = OptimizerConfig(
        name="muon", learning_rate=RATE, weight_decay=DECAY, warmup_steps=2, **options
    )
    schedule = optimizer.on_host(optimizer.make_schedule(config, len(grads)))
    tx = optimizer.make_optimizer(config)
    state, params, updated = tx.init(start), start, []
    update = jax.jit(tx.update)
    for step, grad in enumerate(grads):
        updates, state = update(grad, state, params, learning_rate=schedule(step))
        params = jax.tree.map(jnp.add, params, updates)
        updated.append(by_path(params))
    return updated, schedule


def matrices(path, array):
    """The matrices [in, out] of a kernel, as views."""
    if "qkv" not in path:
        return list(array)
    return [matrix for layer in array.swapaxes(1, 2) for matrix in layer]


def newton_schulz(g):
    """zeropower_via_newtonschulz5 of Jordan et al., in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (np.linalg.norm(g) + 1e-7)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def test_hidden_matrices_follow_the_papers_formula():
    start, grads = draws(8)
    updated, schedule = trained(start, grads, max_grad_norm=2.0)
    params = {k: np.array(v, np.float64) for k, v in by_path(start).items() if k in HIDDEN}
    buffers = {path: np.zeros_like(array) for path, array in params.items()}
    for step, tree in enumerate(grads):
        every = {path: np.asarray(grad, np.float64) for path, grad in by_path(tree).items()}
        norm = np.sqrt(sum((grad**2).sum() for grad in every.values()))
        for path, array in params.items():
            grad = every[path] * min(1, 2.0 / norm)
            buffers[path] = 0.95 * buffers[path] + grad
            nesterov, rate = grad + 0.95 * buffers[path], float(schedule(step))
            array *= 1 - rate * DECAY
            for matrix, g in zip(matrices(path, array), matrices(path, nesterov), strict=True):
                matrix -= rate * 0.2 * np.sqrt(max(g.shape)) * newton_schulz(g)
            np.testing.assert_allclose(updated[step][path], array, rtol=1e-5, atol=1e-6)


def test_every_parameter_follows_torch(monkeypatch):
    """torch computes Newton-Schulz in bfloat16; here in float32. Its matrices are [out, in]."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    start, grads = draws(8)
    updated, schedule = trained(start, grads, max_grad_norm=0)

    def parts(path, array):
        parts = matrices(path, np.array(array)) if path in HIDDEN else [np.array(array)]
        return [torch.tensor(part.T if path in HIDDEN else part) for part in parts]

    theirs = {
        path: [torch.nn.Parameter(part) for part in parts(path, array)]
        for path, array in by_path(start).items()
    }

    def of(*, hidden, decays):
        chosen = [p for p in theirs if (p in HIDDEN) == hidden and (p in DECAYS) == decays]
        return [part for path in chosen for part in theirs[path]]

    groups = [
        {"params": of(hidden=False, decays=True), "weight_decay": DECAY},
        {"params": of(hidden=False, decays=False), "weight_decay": 0.0},
    ]
    both = [
        torch.optim.Muon(
            of(hidden=True, decays=True), weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups),
    ]
    for step, tree in enumerate(grads):
        for path, grad in by_path(tree).items():
            for parameter, part in zip(theirs[path], parts(path, grad), strict=True):
                parameter.grad = part
        for one in both:
            for group in one.param_groups:
                group["lr"] = float(schedule(step))
            one.step()
        for path, ours in updated[step].items():
            for parameter, part in zip(theirs[path], parts(path, ours), strict=True):
                difference = (parameter.detach() - part).abs().max()
                assert difference < 1e-5, path


def test_singular_values_come_near_one_and_a_zero_gradient_moves_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 20, 32)), jnp.float32)
    values = np.linalg.svd(muon.orthogonalized(x), compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3
    assert not muon.orthogonalized(0 * x).any()


@pytest.mark.parametrize("case", [*tiny.CASES, *tiny.SCORERS])
def test_matrices_of_layers_and_nothing_else(case):
    config = (tiny.CASES | tiny.SCORERS)[case]
    shapes = model_of(config, "here").shapes
    for path, label in by_path(muon.labels(shapes)).items():
        in_layers = any(part in ("layers", "layer", "h") for part in path.split("/"))
        assert (label == "muon") == (in_layers and path.endswith("kernel")), path


def test_what_it_cannot_do_is_refused():
    with pytest.raises(
        ConfigError, match=r"optimizer.state_dtype: 8bit is AdamW's, and muon has half"
    ):
        OptimizerConfig(name="muon", state_dtype="8bit")
    argv = ["--model.name_or_path=m", "--data.train=d", "--optimizer.name=muon"]
    argv += ["--lora.target_modules=all-linear"]
    with pytest.raises(ConfigError, match="optimizer.name: muon trains whole matrices, and adapt"):
        cli.parse(TrainSFT, argv)


@pytest.mark.slow
def test_it_learns_and_accumulation_changes_only_rounding(tmp_path):
    ground = tiny.ground(tmp_path, {"gpt2": tiny.CONFIGS["gpt2"]}, sft=tiny.sft_rows(40))
    losses = [
        losses_of(
            train(
                "sft",
                ground / "gpt2",
                ground,
                tmp_path / f"in-{parts}",
                gradient_accumulation_steps=parts,
                **{"optimizer.name": "muon", "optimizer.learning_rate": 1e-2},
            )[0]
        )
        for parts in (1, 4)
    ]
    assert losses[0][-1] < losses[0][0] - 1
    np.testing.assert_allclose(*losses, atol=1e-4)
