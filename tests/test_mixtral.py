"""Mixtures of experts against transformers: the router's choice and its balance loss, in packed and
accumulated rows, quantised experts, and what has no adapters."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import (
    MixtralTopKRouter,
    load_balancing_loss_func,
)

from easyaira.algorithms.sft import sft
from easyaira.config.algorithms import SFTConfig
from easyaira.config.model import LoraConfig
from easyaira.distributed import mesh as meshes
from easyaira.distributed.tree import by_path
from easyaira.errors import ConfigError, WeightsError
from easyaira.lora.adapter import adapter_of
from easyaira.lora.held import held_target
from easyaira.losses.router import balance
from easyaira.models.registry import model_of
from easyaira.models.routing import weights_of
from easyaira.plan import cost
from easyaira.run import run as runs
from easyaira.storage.pretrained import Pretrained
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.runs import configure, losses_of, train

CONFIG = tiny.CASES["mixtral"] | {"router_aux_loss_coef": 0.3}
EIGHT_7B = {"model_type": "mixtral"}  # the defaults are its sizes
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LENGTHS = (5, 9, 7)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    coefficient = {"router_aux_loss_coef": 0.3}
    cases = {case: config | coefficient for case, config in tiny.CASES.items()}
    return tiny.loaded_once(tmp_path_factory, cases)


def texts():
    """Tokens of three examples, and which of them have loss."""
    rng = np.random.default_rng(3)
    tokens = [rng.integers(1, tiny.VOCAB, n) for n in LENGTHS]
    learned = [rng.random(n) < 0.6 for n in LENGTHS]
    for mask in learned:
        mask[0], mask[-1] = False, True
    return list(zip(tokens, learned, strict=True))


def rows_of(places, width, parts):
    """A batch with a row for each list of numbers in `places`, of the examples side by side."""
    fields = np.zeros((5, len(places), width), int)
    for row, numbers in enumerate(places):
        start = 0
        for number in numbers:
            tokens, learned = parts[number]
            at = row, slice(start, start := start + len(tokens))
            for field, values in zip(
                fields, (tokens, np.arange(len(tokens)), number + 1, 0, learned), strict=True
            ):
                field[at] = values
    names = ("tokens", "positions", "segment_ids", "sides", "loss_mask")
    batch = dict(zip(names, map(jnp.asarray, fields), strict=True))
    return batch | {"loss_mask": batch["loss_mask"] > 0}


def transformers_loss(theirs, tokens, learned):
    """That of `output_router_logits` on one example."""
    labels = np.where(learned, tokens, -100)
    ids = torch.tensor(tokens[None])
    return theirs(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.tensor(labels[None]),
        output_router_logits=True,
    ).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts, count", [(4, 2), (8, 2), (3, 1), (5, 5)])
@pytest.mark.slow
def test_weights_are_those_of_transformers_router(experts, count, dtype):
    sizes = {"num_local_experts": experts, "num_experts_per_tok": count, "hidden_size": 16}
    router = MixtralTopKRouter(tiny.torch_model(tiny.CASES["mixtral"] | sizes).config)
    torch.nn.init.normal_(router.weight, std=0.2)
    with torch.no_grad():
        logits, weights, places = router.to(dtype)(torch.randn(200, 16).to(dtype))
    kept = logits.float().sort(descending=True).values
    apart = (kept.diff() < 0).all(-1) if dtype == torch.bfloat16 else torch.full((200,), True)
    assert apart.sum() > 150  # PyTorch's choice among equal ones is anyone's
    wanted = torch.zeros(200, experts).scatter(1, places, weights.float())
    ours = jax.jit(weights_of, static_argnums=1)(logits.float().numpy(), count)
    np.testing.assert_allclose(ours[apart.numpy()], wanted[apart], atol=1e-6)
    np.testing.assert_array_equal((np.asarray(ours) > 0).sum(-1), count)


def test_of_equal_experts_the_first_are_chosen():
    weights = weights_of(jnp.array([[0.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), 2)
    high = np.exp(2) / (1 + np.exp(2))
    np.testing.assert_allclose(weights, [[1 - high, high, 0, 0], [0.5, 0.5, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.slow
def test_balance_is_transformers_loss_of_each_example(count):
    """Value, and gradients of logits; a row of two examples and padding, and one of another."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 2, 16, 4)).astype(np.float32)
    batch = rows_of([[0, 1], [2]], 16, texts())

    def ours(logits):
        return balance(logits, batch["segment_ids"], batch["loss_mask"], count=count)

    value, grads = jax.jit(jax.value_and_grad(ours))(logits)
    given = torch.tensor(logits, requires_grad=True)
    wanted, spans = 0.0, [(0, 0, 5), (0, 5, 14), (1, 0, 7)]
    for (row, start, stop), (_, learned) in zip(spans, texts(), strict=True):
        of_example = tuple(given[layer, row, start:stop] for layer in range(3))
        wanted = wanted + load_balancing_loss_func(of_example, 4, count) * int(learned.sum())
    wanted.backward()
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-6)
    np.testing.assert_allclose(grads, given.grad, atol=1e-5, rtol=1e-5)
    assert np.abs(grads).max() > 0.01


@pytest.mark.slow
def test_balance_of_an_even_router_is_the_number_of_chosen_experts():
    """By the formula: E sum_i (count / E) (1 / E)."""
    logits = 1e-6 * np.eye(4, dtype=np.float32)[None, None]  # each token prefers another
    segments = np.ones((1, 4), np.int32)
    value = jax.jit(partial(balance, count=1))(logits, segments, segments > 0)
    np.testing.assert_allclose(value, 4 * 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "mixtral-tied-one-of-three"])
@pytest.mark.parametrize("number", [0, 2])
def test_loss_and_gradients_of_one_example_are_those_of_transformers(case, number, loaded):
    theirs, model, params = loaded(case)
    batch = rows_of([[0]], 16, texts()[number : number + 1])
    loss_fn = sft(model, SFTConfig(router_aux_loss=True))

    @jax.jit
    def compared(params, batch):
        def mean(params):
            sums = loss_fn(params, None, batch, None)
            return sums["loss"][0] / sums["loss"][1], sums

        plain = sft(model)(params, None, batch, None)["loss"]
        return jax.value_and_grad(mean, has_aux=True)(params), plain

    ((loss, sums), grads), plain = compared(params, batch)
    theirs.zero_grad()
    wanted = transformers_loss(theirs, *texts()[number])
    wanted.backward()
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-5)
    grads = tiny.as_theirs(model, grads)
    for name, grad in tiny.gradients(theirs).items():
        assert np.abs(grads.pop(name) - grad).max() <= 1e-5 * max(np.abs(grad).max(), 1), name
    assert not grads
    added = 0.3 * sums["router_aux_loss"][0]
    np.testing.assert_allclose(sums["loss"][0] - plain[0], added, rtol=1e-3)
    assert added > 0.1


@pytest.mark.slow
def test_packed_is_plain_is_accumulated_is_the_sum_over_examples(loaded):
    theirs, model, params = loaded("mixtral")
    loss_fn = sft(model, SFTConfig(router_aux_loss=True))

    @jax.jit
    def summed(params, batch):
        def total(params):
            sums = loss_fn(params, None, batch, None)
            return sums["loss"][0], {name: s for name, s in sums.items() if "loss" in name}

        return jax.value_and_grad(total, has_aux=True)(params)

    packed = summed(params, rows_of([[0, 2], [], [1]], 14, texts()))  # a row of padding, too
    plain = summed(params, rows_of([[0], [1], [2]], 14, texts()))
    alone = [summed(params, rows_of([[0], [], []], 14, [part])) for part in texts()]
    added = jax.tree.map(lambda *leaves: sum(map(np.asarray, leaves)), *alone)
    for other in (plain, added):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), packed, other
        )
    with torch.no_grad():
        wanted = sum(transformers_loss(theirs, *part).item() * part[1].sum() for part in texts())
    np.testing.assert_allclose(packed[0][0], wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dots", "full"])
def test_gradient_checkpointing_changes_no_number(policy, loaded):
    _, model, params = loaded("mixtral")
    batch = rows_of([[0, 2], [1]], 14, texts())
    saving = replace(model, compute=replace(model.compute, gradient_checkpointing=policy))

    def grads(model):
        loss_fn = sft(model, SFTConfig(router_aux_loss=True))

        def loss(params, batch):
            return loss_fn(params, None, batch, None)["loss"][0]

        return jax.jit(jax.grad(loss))(params, batch)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
        grads(model),
        grads(saving),
    )


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    models = {"mixtral": CONFIG, "llama": tiny.CONFIGS["llama"]}
    rows = {"sft": tiny.sft_rows(40), "dpo": tiny.dpo_rows(40)}
    return tiny.ground(tmp_path_factory.mktemp("ground"), models, **rows)


@pytest.mark.slow
def test_a_run_is_the_same_packed_or_accumulated_and_logs_its_balance(ground, tmp_path):
    args, options = ("sft", ground / "mixtral", ground), {"max_steps": 5}
    options |= {"sft.router_aux_loss": True, "data.eval": 0.2, "eval_steps": 5}
    runs = [
        train(*args, tmp_path / name, **options, **own)[0]
        for name, own in {
            "plain": {"data.packing": False},
            "accumulated": {"data.packing": True, "gradient_accumulation_steps": 4},
        }.items()
    ]
    np.testing.assert_allclose(*map(losses_of, runs), atol=1e-4)
    balances = [row["router_aux_loss"] for row in runs[0] if "router_aux_loss" in row]
    assert len(balances) == 5 and min(balances) > 1
    assert any("eval_router_aux_loss" in row for row in runs[0])


def test_a_model_without_experts_has_nothing_to_balance(ground, tmp_path):
    config, algorithm = configure(
        "sft", ground / "llama", ground, tmp_path / "x", **{"sft.router_aux_loss": True}
    )
    with pytest.raises(ConfigError, match=r"sft.router_aux_loss: .*llama has no experts to bal"):
        prepare(config, algorithm)


@pytest.mark.slow
def test_output_router_logits_without_the_option_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "train", lambda *_: None)  # it is told before
    line = "config.json has output_router_logits: true"
    tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    for switch, option in ((True, False), (True, True), (False, False)):
        name = f"{switch}-{option}"
        tiny.save(tmp_path / name, CONFIG | {"output_router_logits": switch})
        args = ("sft", tmp_path / name, tmp_path, tmp_path / f"run-{name}")
        runs.run(*configure(*args, **{"sft.router_aux_loss": option}), dry_run=None)
        printed = capsys.readouterr().out.replace("\n", " ")
        assert (line in printed) == (switch and not option)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_experts_per_tok": 9}, "num_local_experts is 8; it must be from num_experts_per_tok"),
        (
            {"num_local_experts": 10**9},
            "num_local_experts is 1000000000; it must be from .* to 256",
        ),
        ({"num_local_experts": 0}, "num_local_experts is 0; it must be at least 1"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 is not supported; only 0.0"),
        ({"num_local_experts": 2.5}, "num_local_experts is 2.5; expected int"),
        ({"output_router_logits": 1}, "output_router_logits is 1; expected bool"),
    ],
)
def test_sizes_that_no_mixture_has_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        model_of(EIGHT_7B | values, "config.json")


def test_tensors_of_other_experts_are_missing_or_unknown(tmp_path):
    tiny.save(tmp_path, CONFIG)
    for experts, message in ((5, "missing .*experts.4.w1"), (3, "unknown .*experts.3.w1")):
        model = model_of(CONFIG | {"num_local_experts": experts}, "x")
        with pytest.raises(WeightsError, match=message):
            Pretrained("x", tmp_path).check(model)


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            "all-linear",
            "with all-linear, peft would also adapt router and experts, .* name k_proj, o_",
        ),
        (["q_proj", "w1"], "'w1' is a router or in the experts, which have no adapters; choose f"),
        (["gate"], "'gate' is a router or in the experts"),
        (r".*layers\.\d+\..*(w2|q_proj)", "is a router or in the experts"),
        (["experts"], "'experts' is not a linear layer of this model's blocks"),
    ],
)
def test_router_and_experts_have_no_adapters(targets, message):
    with pytest.raises(ConfigError, match=message):
        adapter_of(LoraConfig(targets), model_of(CONFIG, "x"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft's, about names that it adds itself
def test_peft_adapts_router_and_experts_by_all_linear():
    """Hence the refusal; if this fails, `all-linear` can mean the attention."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    theirs = get_peft_model(tiny.torch_model(CONFIG), PeftConfig(target_modules="all-linear"))
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    parts = {part for name in trained for part in ("mlp.gate", "mlp.experts") if part in name}
    assert parts == {"mlp.gate", "mlp.experts"}


@pytest.mark.parametrize("how, most", [("int8", 1.02), ("nf4", 0.57)])
def test_memory_of_held_experts(how, most):
    """Of Mixtral 8x7B, from shapes: kernels but the router's are quantised."""
    model = model_of(EIGHT_7B, "here")
    adapter = adapter_of(LoraConfig(ATTENTION, quantize=how), model)
    held = by_path(held_target(adapter, meshes.make_mesh("fsdp=-1"), jnp.bfloat16))
    kernels = [leaf for path, leaf in held.items() if "/kernel/" in path]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in kernels)
    count = sum(
        leaf.size
        for path, leaf in by_path(model.shapes).items()
        if path.endswith("kernel") and "gate" not in path and path.startswith("model/layers")
    )
    assert count > 45e9 and 0.5 < size / count <= most
    assert held["model/layers/block_sparse_moe/gate/kernel"].dtype == jnp.bfloat16


def test_flops_count_every_expert_for_every_token(ground, tmp_path):
    """As they are computed: 6 for each weight of a product and token."""
    config, algorithm = configure("sft", ground / "mixtral", ground, tmp_path / "x")
    setup = prepare(config, algorithm)
    D, F, V, experts = 16, 24, tiny.VOCAB, 4
    layer = D * D * 2 + D * 8 * 2 + D * experts + experts * 3 * D * F
    norms = 2 * 2 * D + D
    assert setup.model.parameter_count() == 2 * layer + 2 * V * D + norms
    assert cost.flops_per_token(setup.model, False) == 6 * (2 * layer + V * D + norms)
    update = cost.largest_update(setup, algorithm)
    positions = update.parts * update.rows * update.length
    dense = configure("sft", ground / "llama", ground, tmp_path / "y")
    dense = prepare(*dense)
    other = cost.largest_update(dense, algorithm)
    assert (other.rows, other.length) == (update.rows, update.length)
    added = 2 * (D * experts + (experts - 1) * 3 * D * F) * positions * 2
    forward = [cost.work_of(s, u, False)["forward"] for s, u in ((setup, update), (dense, other))]
    assert forward[0] - forward[1] == added
