"""Adapters and quantised bases, against peft, torch and the formulas of their papers."""

import gc
import json
import shutil
import statistics
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from easyaira import convert
from easyaira.config.algorithms import OptimizerConfig
from easyaira.config.data import DataConfig
from easyaira.config.model import LoraConfig, PolicyConfig
from easyaira.config.run import TrainDPO
from easyaira.distributed import mesh as meshes
from easyaira.distributed.tree import by_path, path_of
from easyaira.errors import ConfigError, Preempted, WeightsError
from easyaira.lora import peft
from easyaira.lora.adapter import adapter_of, joined, module_of
from easyaira.lora.held import held_target, hold, holder
from easyaira.losses import token_logps
from easyaira.models import quantize
from easyaira.models.layers import Compute
from easyaira.models.registry import model_of
from easyaira.plan import cost
from easyaira.plan import report as plan_report
from easyaira.run.run import run
from easyaira.storage.checkpoints import Checkpoints
from easyaira.storage.pretrained import Pretrained, find
from easyaira.train import optimizer
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.adapters import TARGETS, peft_model
from helpers.runs import configure, losses_of, same_bits, stop_after, train

WHOLE = {"gpt2": ["wte"], "llama": ["embed_tokens", "lm_head"], "opt": ["embed_tokens"]}
WHOLE["mixtral"] = WHOLE["llama"]
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapter_for(kind, model, **options):
    if options.pop("whole", False):
        options["modules_to_save"] = WHOLE[kind]
    options = {"target_modules": TARGETS[kind], "r": 4, "alpha": 8.0, **options}
    return adapter_of(LoraConfig(**options), model)


def drawn(adapter, std=0.2, seed=1):
    """An adapter that has been trained: nothing in it is zero but the vocabulary's padding."""
    rng, axes = np.random.default_rng(seed), {row.ours: row.op.vocab_axis for row in adapter.whole}

    def draw(path, leaf):
        values = rng.normal(0, std, leaf.shape)
        if path_of(path) in axes:
            np.moveaxis(values, axes[path_of(path)], 0)[tiny.VOCAB :] = 0
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, adapter.shapes)


def rows_of(seed=0):
    return tiny.layout(np.random.default_rng(seed).integers(1, tiny.VOCAB, (3, 12)))


def logits(model, params, rows, key=None):
    def of(params, rows):
        hidden, head = model.apply(params, rows, key)
        return model.logits(hidden, head)

    return np.asarray(jax.jit(of)(params, rows))


def near(ours, theirs, tolerance=1e-5):
    assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1)


def saved_adapter(folder, kind, adapter, params):
    """The adapter as our export lays it out."""
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(
        peft.to_peft(adapter, params), folder / peft.ADAPTER_WEIGHTS, metadata={"format": "pt"}
    )
    (folder / peft.ADAPTER_CONFIG).write_text(json.dumps(peft.peft_config(adapter, kind, None)))
    return folder


# ---------------------------------------------------------------------------------------------
# the adapter as a function


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_new_adapter_changes_no_bit(kind, dora, models):
    model, base = tiny.load(models / kind)
    adapter = adapter_for(kind, model, dora=dora)
    params = adapter.init(jax.random.key(0), adapter.of_base(base))
    np.testing.assert_array_equal(
        logits(model, adapter.on(base, params), rows_of()), logits(model, base, rows_of())
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "lora_b":
            assert not leaf.any()
        elif path[-1].key == "lora_a":  # torch.nn.init.kaiming_uniform_(A, a=sqrt(5)) of A [r, in]
            bound = leaf.shape[1] ** -0.5
            assert bound * 0.9 < np.abs(leaf).max() <= bound
            assert not np.array_equal(leaf[0], leaf[1])  # every layer draws its own
    first, *others = [x.ravel()[:9] for x in jax.tree.leaves(params) if x.any()]
    assert not any(np.array_equal(first, other) for other in others)


PATTERNS = {  # of query and output layers of each kind
    "rank_pattern": {"(q_proj|c_attn)": 2},
    "alpha_pattern": {"(o_proj|out_proj|c_proj)": 6.0},
}
KINDS_OF_LORA = [{}, {"rslora": True}, {"dora": True}, {"whole": True}, PATTERNS]
KINDS_OF_LORA += [PATTERNS | {"rslora": True}]


@pytest.mark.parametrize("options", KINDS_OF_LORA, ids=str)
@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.slow
def test_merged_is_unmerged(kind, options, models):
    model, base = tiny.load(models / kind)
    adapter = adapter_for(kind, model, **options)
    root = "rslora" in options
    scales = {8 / 2} if root else {8 / 4}
    if "rank_pattern" in options:
        scales |= {8 / 2**0.5, 6 / 2} if root else {8 / 2, 6 / 4}
    assert {*adapter.scales.values()} == scales
    params = drawn(adapter)
    tuned = logits(model, adapter.on(base, params), rows_of())
    near(logits(model, adapter.merge(base, params), rows_of()), tuned)
    assert np.abs(tuned - logits(model, base, rows_of())).max() > 0.1


@pytest.mark.parametrize(
    "patterns, problem",
    [
        ({"rank_pattern": {"fc9": 2}}, "lora.rank_pattern: 'fc9' matches no layer with an adapter"),
        ({"alpha_pattern": {"up_proj": 2}}, "lora.alpha_pattern: 'up_proj' matches no layer"),
        (
            {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
            "matches only some layers of model.layers",
        ),
        ({"rank_pattern": {"(": 2}}, "lora.rank_pattern: missing "),
    ],
    ids=str,
)
def test_patterns_are_of_all_layers_and_of_adapted_ones(patterns, problem, models):
    model, _ = tiny.load(models / "llama")
    with pytest.raises(ConfigError, match=problem):
        _ = adapter_for("llama", model, **patterns).shapes


@pytest.mark.parametrize("options", KINDS_OF_LORA, ids=str)
@pytest.mark.parametrize("kind", [*tiny.CONFIGS, "mixtral"])
@pytest.mark.slow
def test_peft_loads_ours_and_gives_the_same_logits(kind, options, models, tmp_path, recwarn):
    from peft import PeftModel

    model, base = tiny.load(models / kind)
    adapter = adapter_for(kind, model, **options)
    params = drawn(adapter)
    folder = saved_adapter(tmp_path / "a", kind, adapter, params)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models / kind), folder
    ).eval()
    assert not [w for w in recwarn if "missing" in str(w.message) or "tying" in str(w.message)]
    rows = rows_of()
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(np.array(rows["tokens"]))).logits.numpy()
    near(logits(model, adapter.on(base, params), rows), wanted)
    same_bits(peft.read_peft(adapter, folder), params)


TOKENS = [3, 70, 71]  # ids whose vectors are trained, too


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options",
    [(kind, {}) for kind in ("opt", *tiny.FAMILIES)]
    + [
        ("gpt2", {"use_dora": True}),
        (
            "llama",
            {
                "use_dora": True,
                "rank_pattern": {"self_attn.q_proj": 2, "down_proj": 7},
                "alpha_pattern": {"k_proj": 3, r"layers\.\d+\.self_attn\.q_proj": 5},
            },
        ),
        ("gpt2", {"trainable_token_indices": {"wte": TOKENS}}),
        ("gpt2", {"modules_to_save": ["wte", "lm_head"], "ensure_weight_tying": True}),
        ("llama", {"modules_to_save": ["lm_head"], "trainable_token_indices": TOKENS}),
        (
            "llama",
            {
                "modules_to_save": ["model.embed_tokens"],
                "trainable_token_indices": {"lm_head": TOKENS},
            },
        ),
    ],
    ids=str,
)
def test_logits_and_gradients_of_an_adapter_that_peft_saved(kind, options, models, tmp_path):
    theirs = peft_model(models / kind, kind, **options)
    theirs.save_pretrained(tmp_path)
    model, base = tiny.load(models / kind)
    tokens = options.get("trainable_token_indices") and TOKENS
    dora, tied = options.get("use_dora", False), options.get("ensure_weight_tying", False)
    saved = [name.split(".")[-1] for name in options.get("modules_to_save", ())]
    saved = [name for name in saved if not (tied and name == "lm_head")]
    patterns = {name: options[name] for name in peft.PATTERNS if name in options}
    adapter = adapter_for(
        kind, model, trainable_token_indices=tokens, dora=dora, modules_to_save=saved, **patterns
    )
    params = peft.read_peft(adapter, tmp_path)
    rows = rows_of()
    ids = torch.tensor(np.array(rows["tokens"]))
    out = theirs(input_ids=ids).logits
    picked = out[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    (-picked.mean()).backward()

    def loss_fn(params):
        hidden, head = model.apply(adapter.on(base, params), rows)
        sizes = model.head_options
        logps = token_logps.token_logps(hidden, head, rows["tokens"], **sizes).logps
        return -logps.sum() / picked.numel(), model.logits(hidden, head)

    grads, tuned = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
    near(tuned, out.detach().numpy())
    ours = peft.to_peft(adapter, grads)
    seen = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            name = name.replace(".default", "").replace("vector.weight", "vector")
            name = name.replace("modules_to_save.", "")
            near(ours[name], parameter.grad.numpy())
            seen += 1
    merged = adapter.merge(base, params)
    near(logits(model, merged, rows), out.detach().numpy())
    assert seen == len(ours) - tied > 8  # ours has a tied head beside the embedding
    if dora:
        wanted = theirs.merge_and_unload().state_dict()
        kernels = by_path(merged)
        for row in adapter.targets:
            for i, kernel in enumerate(np.asarray(kernels[row.ours])):
                near(row.op.to_theirs(kernel), wanted[row.theirs.format(i)].numpy())


@pytest.mark.parametrize("kind, saved", [("llama", WHOLE["llama"]), ("gpt2", ["wte", "lm_head"])])
@pytest.mark.slow
def test_updates_are_those_of_peft_under_adamw(kind, saved, models, tmp_path):
    """Of an adapter and of whole tables. A large epsilon keeps rounding from becoming steps."""
    settings = {"learning_rate": 0.05, "weight_decay": 0.1, "adam_epsilon": 0.1}
    tied = kind == "gpt2"
    theirs = peft_model(models / kind, kind, modules_to_save=saved, ensure_weight_tying=tied)
    theirs.save_pretrained(tmp_path)
    model, base = tiny.load(models / kind)
    adapter = adapter_for(kind, model, whole=True)
    params = peft.read_peft(adapter, tmp_path)
    frozen, _ = adapter.parted(base)
    tx = optimizer.make_optimizer(OptimizerConfig(max_grad_norm=0, **settings))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1, eps=0.1)

    def loss_fn(params, rows):
        hidden, head = model.apply(adapter.on(frozen, params), rows)
        logps = token_logps.token_logps(hidden, head, rows["tokens"], **model.head_options).logps
        return -logps.sum() / (3 * 11)

    @jax.jit
    def update(params, state, rows):
        loss, grads = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = tx.update(grads, state, params, learning_rate=0.05)
        return loss, jax.tree.map(jnp.add, params, updates), state

    state, begun = tx.init(params), peft.to_peft(adapter, params)
    for seed in range(3):
        loss, params, state = update(params, state, rows_of(seed))
        ids = torch.tensor(np.array(rows_of(seed)["tokens"])).long()
        wanted = theirs(input_ids=ids, labels=ids).loss
        assert float(loss) == pytest.approx(wanted.item(), abs=1e-5)
        adamw.zero_grad()
        wanted.backward()
        adamw.step()
    theirs.save_pretrained(tmp_path)
    reached = peft.to_peft(adapter, params)
    for name, tensor in load_file(tmp_path / peft.ADAPTER_WEIGHTS).items():
        near(reached[name], tensor)
        assert np.abs(begun[name] - tensor).max() > 1e-3


def test_all_of_an_adapter_decays_as_peft_under_transformers_does():
    adapter = adapter_for("gpt2", model_of(tiny.CONFIGS["gpt2"], "here"), dora=True, whole=True)
    assert all(jax.tree.leaves(optimizer.decays(adapter.shapes)))


def test_dropout_of_adapters_is_active_with_a_key_and_only_then(models):
    model, base = tiny.load(models / "llama")
    plain, dropping = (adapter_for("llama", model, dropout=rate) for rate in (0.0, 0.5))
    params = drawn(plain)
    rows = rows_of()
    wanted = logits(model, plain.on(base, params), rows)
    tuned = dropping.on(base, params)
    np.testing.assert_array_equal(logits(model, tuned, rows), wanted)
    first, same, other = (logits(model, tuned, rows, jax.random.key(k)) for k in (0, 0, 1))
    assert np.array_equal(first, same) and not np.allclose(first, other)
    zeros = jax.tree.map(jnp.zeros_like, params)
    dropped = logits(model, dropping.on(base, zeros), rows, jax.random.key(0))
    np.testing.assert_array_equal(dropped, logits(model, base, rows))  # the base drops nothing


def test_dropout_keeps_the_mean_and_drops_its_share():
    from easyaira.models.linear import Linear

    a = jnp.eye(64)[None]
    params = {"kernel": jnp.zeros((64, 64)), "lora_a": a[0], "lora_b": jnp.eye(64)}
    params["lora_dropout"] = jnp.float32(0.25)
    x = jnp.ones((500, 64))
    y = Linear(64, 0.02).apply({"params": params}, x, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(y) != 0
    np.testing.assert_allclose(np.asarray(y)[kept], 1 / 0.75, rtol=1e-6)
    share, deviation = kept.mean(), (0.75 * 0.25 / kept.size) ** 0.5
    assert abs(share - 0.75) < 5 * deviation


def test_dropout_in_front_of_magnitudes_is_pefts():
    """With the mask that our key draws in the place of peft's own."""
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora import Linear as PeftLinear

    from easyaira.models.linear import Linear

    rng = np.random.default_rng(0)
    draws = {"kernel": (16, 12), "bias": (12,), "lora_a": (16, 4), "lora_b": (4, 12)}
    params = {name: rng.normal(0, 0.5, shape) for name, shape in draws.items()}
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    x = rng.normal(size=(7, 16)).astype(np.float32)
    layer, key = Linear(12, 0.02, use_bias=True), {"dropout": jax.random.key(0)}

    base = torch.nn.Linear(16, 12)
    settings = PeftConfig(lora_dropout=0.3, use_dora=True)
    theirs = PeftLinear(base, "default", config=settings, r=4, lora_alpha=4)
    ones = {"kernel": np.zeros((16, 16)), "lora_a": np.eye(16), "lora_b": np.eye(16)}
    rate = {"lora_dropout": jnp.float32(0.3)}
    kept = Linear(16, 0.02).apply({"params": ones | rate}, np.ones((7, 16), np.float32), rngs=key)
    assert 0 < np.mean(np.asarray(kept) == 0) < 1
    theirs.lora_dropout["default"] = Masked(torch.tensor(np.array(kept)))
    magnitude = theirs.lora_magnitude_vector["default"].weight
    for target, value in (
        (base.weight, params["kernel"].T), (base.bias, params["bias"]),
        (theirs.lora_A["default"].weight, params["lora_a"].T),
        (theirs.lora_B["default"].weight, params["lora_b"].T),
    ):  # fmt: skip
        target.data = torch.tensor(value)
    tuned = params["kernel"] + params["lora_a"] @ params["lora_b"]
    gain = magnitude.detach().numpy() / np.linalg.norm(tuned, axis=0)
    for training, rngs in ((True, key), (False, {})):
        wanted = theirs.train(training)(torch.tensor(x)).detach().numpy()
        ours = layer.apply({"params": params | rate | {"lora_gain": gain}}, x, rngs=rngs)
        near(np.asarray(ours), wanted)


class Masked(torch.nn.Module):
    """Dropout with a given mask."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        return x * self.kept


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            ["q_proj", "c_attn"],
            "'c_attn' is not a linear layer .* choose from down_proj, gate_proj",
        ),
        ([], "is not a linear layer"),
        ("nothing", "'nothing' is not a linear layer"),
        ("q_proj", r"'q_proj' is not a linear layer .*; write a list as \[q_proj\]"),
        (["lm_head"], "'lm_head' is not a linear layer"),
        (r".*layers\.0\.self_attn\.q_proj", "matches 1 of 2 layers of model.layers.{}.self_attn.q"),
        ("*", "nothing to repeat"),
    ],
)
def test_targets_that_are_not_there_are_named(targets, message):
    model = model_of(tiny.CONFIGS["llama"], "here")
    with pytest.raises(ConfigError, match=message):
        adapter_of(LoraConfig(targets), model)


@pytest.mark.parametrize(
    "kind, names, message",
    [
        ("gpt2", ["wte", "lm_head"], "lm_head is tied to the embedding .* name wte instead"),
        ("gpt2", ["wpe"], "'wpe' is not a table with a vector for each token.*; choose from wte$"),
        ("llama", ["embed_tokens", "norm"], "'norm' is not .* choose from embed_tokens, lm_head"),
        ("llama", ["q_proj"], "'q_proj' is not a table"),
        ("llama", ["model.embed_tokens"], "'model.embed_tokens' is not a table"),
    ],
)
def test_only_tables_are_saved_whole(kind, names, message):
    model = model_of(tiny.CONFIGS[kind], "here")
    with pytest.raises(ConfigError, match=f"lora.modules_to_save: {message}"):
        adapter_for(kind, model, modules_to_save=names)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_parameters_of_whole_tables_are_counted_without_padding(kind):
    model = model_of(tiny.CONFIGS[kind], "here")
    plain, whole = adapter_for(kind, model), adapter_for(kind, model, whole=True)
    tables = len(WHOLE[kind]) * tiny.VOCAB * model.config.width
    assert whole.parameter_count() == plain.parameter_count() + tables


def test_targets_are_matched_as_peft_matches_them():
    model = model_of(tiny.CONFIGS["gpt2"], "here")

    def modules(targets):
        return [module_of(row) for row in adapter_of(LoraConfig(targets), model).targets]

    blocks = "transformer.h.{}."
    assert modules(["c_proj"]) == [blocks + "attn.c_proj", blocks + "mlp.c_proj"]
    assert modules(["attn.c_proj"]) == [blocks + "attn.c_proj"]
    assert modules(r".*\.attn\.c_\w+") == [blocks + "attn.c_attn", blocks + "attn.c_proj"]
    with pytest.raises(ConfigError):
        modules(["proj"])  # a part of a name's last part is not it


# ---------------------------------------------------------------------------------------------
# quantised bases


def test_the_levels_of_nf4_are_those_of_the_paper():
    """Appendix E of Dettmers et al. (2023)."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(quantize.NF4, published, atol=2e-7)


@pytest.mark.parametrize("shape", [(2, 172, 24), (2, 64, 3, 16), (1, 7, 5)])
def test_int8_is_within_half_a_step(shape):
    kernel = np.random.default_rng(0).normal(0, 0.2, shape).astype(np.float32)
    kernel[0, :, ..., 0] = 0  # an output without weights
    held = quantize.quantize(jnp.asarray(kernel), "int8", axis=1)
    assert held["int8"].dtype == jnp.int8 and held["int8"].shape == shape
    step = np.abs(kernel).max(1, keepdims=True) / 127
    back = jax.vmap(lambda h: quantize.dequantize(h, shape[1], jnp.float32))(held)
    assert (np.abs(back - kernel) <= step / 2 * (1 + 1e-5)).all()
    assert not back[0, :, ..., 0].any()


@pytest.mark.parametrize("shape", [(2, 172, 24), (2, 64, 3, 16), (1, 7, 5)])
@pytest.mark.slow
def test_nf4_takes_the_nearest_level_of_each_block(shape):
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 0.2, shape).astype(np.float32)
    held = quantize.quantize(jnp.asarray(kernel), "nf4", axis=1)
    inputs = shape[1]
    assert held["nf4"].dtype == jnp.uint8
    assert held["nf4"].shape == (shape[0], -(-inputs // 2), *shape[2:])
    assert held["scale"].shape == (shape[0], -(-inputs // 64), *shape[2:])
    back = jax.vmap(lambda h: quantize.dequantize(h, inputs, jnp.float32))(held)
    for start in range(0, inputs, 64):
        block = kernel[:, start : start + 64]
        largest = np.abs(block).max(1, keepdims=True)
        choices = quantize.NF4.reshape(-1, *(1,) * block.ndim) * largest
        nearest = np.abs(choices - block).min(0)
        error = np.abs(np.asarray(back[:, start : start + 64]) - block)
        np.testing.assert_allclose(error, nearest, atol=1e-6)
        widest = np.diff(quantize.NF4).max() / 2  # 0.152 of the largest, between -1 and -0.70
        assert (error <= widest * largest + 1e-6).all()


def test_nf4_has_the_error_of_its_levels_on_normal_weights():
    """A block's values over its largest are nearly normal; the mean squared error is that of the
    levels, integrated over the normal density of the same scale."""
    kernel = np.random.default_rng(0).normal(0, 1, (1, 64, 4000)).astype(np.float32)
    held = quantize.quantize(jnp.asarray(kernel), "nf4", axis=1)
    back = np.asarray(quantize.dequantize(jax.tree.map(lambda x: x[0], held), 64, jnp.float32))
    error = ((back - kernel[0]) ** 2).mean() ** 0.5
    largest = np.abs(kernel).max(1).mean()
    x = np.linspace(-largest, largest, 20001)
    nearest = np.abs(x[:, None] - quantize.NF4 * largest).min(1)
    density = np.array([statistics.NormalDist().pdf(v) for v in x])
    wanted = ((nearest**2 * density).sum() / density.sum()) ** 0.5
    assert error == pytest.approx(wanted, rel=0.05)
    assert error < 0.11  # of the standard deviation


@pytest.mark.parametrize("how, bytes_per_weight", [("int8", 1.02), ("nf4", 0.57)])
def test_memory_of_a_held_base(how, bytes_per_weight):
    """Of Llama 2 7B, from shapes; norms, embedding and head are not quantised."""
    model = model_of(LLAMA_2_7B, "here")
    adapter = adapter_of(LoraConfig(ATTENTION, quantize=how), model)
    held = held_target(adapter, meshes.make_mesh("fsdp=-1"), jnp.bfloat16)
    linear = kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        name = path_of(path)
        if "_proj/" in name:
            linear += leaf.size * leaf.dtype.itemsize
        else:
            assert leaf.dtype == (jnp.float32 if "norm" in name else jnp.bfloat16), name
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes):
        kernels += leaf.size * ("_proj/" in path_of(path))
    assert 0.5 < linear / kernels <= bytes_per_weight


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, how", [("gpt2", "nf4"), ("llama", "int8"), ("opt", "nf4"), ("mixtral", "nf4")]
)
def test_a_quantised_model_is_the_model_of_its_dequantised_weights(kind, how, models):
    """Logits and the adapter's gradients."""
    model, base = tiny.load(models / kind)
    adapter = adapter_for(kind, model, quantize=how)
    held = Pretrained("x", models / kind).load(
        model,
        meshes.make_mesh("fsdp=-1"),
        each=holder(adapter, meshes.make_mesh("fsdp=-1"), jnp.float32),
    )

    def plain(leaf, kept):
        if not isinstance(kept, dict):
            return leaf
        return jax.vmap(lambda h: quantize.dequantize(h, leaf.shape[1], jnp.float32))(kept)

    dequantised = jax.tree.map(plain, base, held)
    params = drawn(adapter)

    def loss_fn(params, base):
        hidden, head = model.apply(adapter.on(base, params), rows_of())
        tokens = rows_of()["tokens"]
        return token_logps.token_logps(hidden, head, tokens, **model.head_options).logps.mean()

    near(logits(model, held, rows_of()), logits(model, dequantised, rows_of()))
    grad = jax.jit(jax.grad(loss_fn))
    ours, wanted = (grad(params, tree) for tree in (held, dequantised))
    jax.tree.map(near, ours, wanted)
    assert not np.allclose(logits(model, held, rows_of()), logits(model, base, rows_of()))


@pytest.mark.parametrize("unrolled", [0, 16])
def test_the_backward_pass_keeps_codes_and_not_kernels(unrolled, optimized):
    """Of 16 layers, without gradient checkpointing: the bytes of a step do not hold a float copy
    of each layer's kernels, with a loop over layers or without."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16}
    compute = Compute(unroll_up_to=unrolled)
    model = model_of(tiny.CONFIGS["llama"] | sizes, "here", compute)
    adapter = adapter_of(LoraConfig(["q_proj"], quantize="nf4"), model)
    mesh = meshes.make_mesh("fsdp=-1")
    rows = rows_of()

    def loss_fn(params, base):
        return (model.apply(adapter.on(base, params), rows)[0] ** 2).sum()

    held = held_target(adapter, mesh, jnp.float32)
    step = jax.jit(jax.grad(loss_fn)).lower(adapter.target(mesh), held).compile()
    kernels = sum(
        leaf.size * 4
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes)
        if "_proj/" in path_of(path)
    )
    assert step.memory_analysis().temp_size_in_bytes < kernels / 2


@pytest.mark.slow
def test_a_base_in_bfloat16_computes_what_one_in_float32_does(models):
    """In bfloat16, to which kernels and embeddings are cast where they are used."""
    model, base = tiny.load(models / "llama")
    low = model.with_dtype(jnp.bfloat16)
    adapter = adapter_for("llama", low)
    held = jax.tree_util.tree_map_with_path(
        lambda path, leaf: hold(adapter, path, leaf, jnp.bfloat16), base
    )
    params = drawn(adapter)
    a, b = (
        logits(low, adapter.on(tree, params), rows_of()).astype(np.float32) for tree in (base, held)
    )
    hidden = [low.apply(adapter.on(tree, params), rows_of())[0] for tree in (base, held)]
    np.testing.assert_array_equal(*hidden)
    near(a, b, 1e-2)


# ---------------------------------------------------------------------------------------------
# partition rules


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_adapters_are_divided_as_their_kernels_are(kind, devices):
    model = model_of(tiny.CONFIGS[kind], "here")
    specs = adapter_for(kind, model, dora=True).specs()
    P = jax.sharding.PartitionSpec
    if kind == "gpt2":
        attention = specs["model"]["h"]["attn"]
        assert attention["c_attn"] == {
            "lora_a": P(None, "fsdp", None),
            "lora_b": P(None, None, None, "tp"),
            "lora_magnitude": P(None, None, "tp"),
        }
        assert attention["c_proj"]["lora_a"] == P(None, "tp", None)
    if kind == "llama":
        mlp = specs["model"]["layers"]["mlp"]["down_proj"]
        assert mlp == {
            "lora_a": P(None, "tp", None),
            "lora_b": P(None, None, "fsdp"),
            "lora_magnitude": P(None, "fsdp"),
        }
    devices(8)
    adapter_for(kind, model).target(meshes.make_mesh("fsdp=4,tp=2"))


# ---------------------------------------------------------------------------------------------
# runs

LORA = {"lora.r": 4, "lora.alpha": 8, "optimizer.learning_rate": 2e-2}


def adapted(kind, **options):
    """The options of a run that trains an adapter."""
    return LORA | {"lora.target_modules": json.dumps(TARGETS[kind]), **options}


def far(a, b):
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.slow
def test_only_the_adapter_is_trained_and_saved(models, data, tmp_path, monkeypatch):
    from easyaira.train import loop

    options = {"lora.quantize": "nf4", "lora.modules_to_save": "[embed_tokens]"}
    seen, older = {}, {id(array) for array in jax.live_arrays()}
    real = loop.fit

    def watched(state, frozen, batches, **others):
        gc.collect()
        live = [array for array in jax.live_arrays() if id(array) not in older]
        for name, shape in {"trained": (384, 16), "frozen_head": (16, 384)}.items():
            seen[name] = sum(array.shape == shape for array in live)
        seen["opt_state"] = jax.eval_shape(lambda s: s, state.opt_state)
        before = jax.device_get(frozen)
        state = real(state, frozen, batches, **others)
        same_bits(jax.device_get(frozen), before)
        seen["frozen"] = frozen
        return state

    monkeypatch.setattr(loop, "fit", watched)
    rows, params = train(
        "sft", models / "llama", data, tmp_path / "run", **adapted("llama", **options)
    )
    # the embedding has two moments, and no copy; the head has neither
    assert seen.pop("trained") == 3 and seen.pop("frozen_head") == 1
    assert losses_of(rows)[-1] < 0.8 * losses_of(rows)[0]
    assert all(leaf.any() for leaf in jax.tree.leaves(params))
    config, algorithm = configure(
        "sft", models / "llama", data, tmp_path / "run", **adapted("llama", **options)
    )
    setup = prepare(config, algorithm)
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.adapter.shapes))
    moments = [leaf.size for leaf in jax.tree.leaves(seen["opt_state"]) if leaf.size > 1]
    assert sum(moments) == 2 * count
    same_bits(jax.device_get(seen["frozen"].base), jax.device_get(setup.trainable.base.params))
    saved = Checkpoints(tmp_path / "run/checkpoints")
    meta = saved.meta(20)
    saved.close()
    assert meta["lora"]["base"]["name"] == str(models / "llama")
    for item in ("params", "opt_state"):
        stored = (tmp_path / "run/checkpoints/20" / item / "_METADATA").read_text()
        assert "lora_a" in stored and "embed_tokens" in stored and "kernel" not in stored


@pytest.mark.slow
def test_dpo_starts_at_the_base_and_is_held_to_it(models, data, tmp_path):
    """A quantised one, with magnitudes and whole tables."""
    kind, own = "llama", {"lora.quantize": "nf4", "lora.dora": True}
    own["lora.modules_to_save"] = "[embed_tokens, lm_head]"
    options = adapted(kind, **{"data.eval": 0.2, "max_steps": 10}) | own
    args = ("dpo", models / kind, data)
    rows, params = train(*args, tmp_path / "before", **options)
    in_step, other = train(
        *args, tmp_path / "in-step", **options, **{"dpo.precompute_ref_log_probs": False}
    )
    for metrics in (rows, in_step):
        assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
        for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert metrics[0][name] == 0
        assert metrics[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[-1]["rewards/margins"] > 0.05
    for a, b in zip(rows, in_step, strict=True):
        for name in ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), abs=1e-5)
    # the reference is the base: its log-probabilities are those of a run that trains all weights
    config, algorithm = configure(*args, tmp_path / "x", **options)
    setup = prepare(config, algorithm)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), dict(setup.batches[0].arrays))
    from easyaira.algorithms.dpo import answer_scores

    _, whole = setup.adapter.parted(tiny.load(models / kind)[1])
    plain, start = (
        answer_scores(setup.model, tree, batch, examples=8).logps
        for tree in (joined(setup.trainable.base.params, whole), setup.start_weights())
    )
    np.testing.assert_array_equal(plain, start)


@pytest.mark.parametrize("whole", [(), ("embed_tokens", "lm_head")])
def test_the_reference_in_the_step_is_no_second_copy(whole, models, data, tmp_path):
    """But of what is trained in full."""
    options = {"dpo.precompute_ref_log_probs": False, "lora.modules_to_save": json.dumps(whole)}
    config, algorithm = configure(
        "dpo", models / "llama", data, tmp_path / "x", **adapted("llama", **options)
    )
    setup = prepare(config, algorithm)
    frozen = setup.trainable.frozen(setup.start_weights())
    assert len(jax.tree.leaves(frozen.base)) == 12 - len(whole)
    of_reference = by_path(frozen.of_algorithm)
    tables = {path for path in of_reference if "/lora_" not in path}
    assert len(of_reference) > len(tables) == len(whole)
    same_bits(
        *(
            {path: tree[path] for path in tables}
            for tree in (of_reference, by_path(tiny.load(models / "llama")[1]))
        )
    )
    shapes = setup.trainable.frozen_target(algorithm.frozen(setup))
    assert jax.tree.structure(shapes) == jax.tree.structure(frozen)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(frozen), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    held = cost.sizes_of(setup, algorithm, cost.largest_update(setup, algorithm))["frozen"]
    assert held == sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))


@pytest.mark.slow
def test_another_reference_stands_alone(models, data, tmp_path):
    """It has another architecture, and none of the policy's trained tables."""
    tiny.save(tmp_path / "other", tiny.CONFIGS["gpt2"], std=0.3)
    options = {"model.ref_name_or_path": tmp_path / "other", "max_steps": 4}
    options["lora.modules_to_save"] = "[embed_tokens]"
    losses = []
    for precompute in (True, False):
        options["dpo.precompute_ref_log_probs"] = precompute
        rows, _ = train(
            "dpo", models / "llama", data, tmp_path / str(precompute), **adapted("llama", **options)
        )
        assert rows[0]["rewards/margins"] != 0
        losses.append(losses_of(rows))
    np.testing.assert_allclose(*losses, atol=1e-5)


@pytest.mark.slow
def test_a_changed_base_is_refused_by_name(models, data, tmp_path, monkeypatch):
    shutil.copytree(models / "gpt2", tmp_path / "gpt2")
    args = ("sft", tmp_path / "gpt2", data, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Preempted):
            train(*args, **adapted("gpt2"))
    tiny.save(tmp_path / "gpt2", tiny.CONFIGS["gpt2"], std=0.19)
    with pytest.raises(WeightsError, match="trained on other weights than .*/gpt2"):
        train(*args, **adapted("gpt2"))
    origin = find(str(tmp_path / "run"))
    model = model_of(origin.config, "run")
    with pytest.raises(WeightsError, match="trained on other weights than .*/gpt2"):
        origin.load(model, meshes.make_mesh("fsdp=-1"))
    with pytest.raises(WeightsError, match="trained on other weights than .*/gpt2"):
        convert.to_hf(str(tmp_path / "run"), str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()
    shutil.rmtree(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="run: put the base of .*gpt2: no such folder"):
        find(str(tmp_path / "run")).check(model)


@pytest.mark.slow
def test_a_run_exports_an_adapter_and_merges_and_is_a_model(models, data, tmp_path, capsys):
    """The adapter's folder, the merged folder, and the run itself say the same."""
    from peft import PeftModel

    out, options = tmp_path / "run", {"export": True, "max_steps": 10, "lora.dora": True}
    options["lora.modules_to_save"] = "[wte]"
    rows, params = train("sft", models / "gpt2", data, out, **adapted("gpt2", **options))
    proof = json.loads((out / "hf/export_report.json").read_text())
    assert proof["logits"]["compared"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md",
            "tokenizer_config.json"} <= {path.name for path in (out / "hf").iterdir()}  # fmt: skip
    convert.main(["to_hf", str(out), str(tmp_path / "merged"), "--merge"])
    convert.main(["to_hf", str(out), str(tmp_path / "adapter")])
    assert capsys.readouterr().out.count("PyTorch logits within") == 3
    stored = json.loads((tmp_path / "merged/export_report.json").read_text())["tensors"]
    assert {tensor["dtype"] for tensor in stored.values()} == {"float32"}
    origin = find(str(out))
    model = model_of(origin.config, "run")
    adapter = adapter_for("gpt2", model, dora=True, whole=True)
    card = (out / "hf/README.md").read_text()
    assert f"; {adapter.parameter_count():,} trained parameters" in card
    ids = rows_of()["tokens"]
    ours = logits(model, origin.load(model, meshes.make_mesh("fsdp=-1")), rows_of())
    base, plain = (AutoModelForCausalLM.from_pretrained(models / "gpt2") for _ in range(2))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        untuned, *wanted = (
            theirs(input_ids=torch.tensor(np.array(ids))).logits.numpy()
            for theirs in (plain, merged, PeftModel.from_pretrained(base, tmp_path / "adapter"))
        )
    for theirs in wanted:
        near(ours, theirs)
    assert np.abs(untuned - ours).max() > 0.1
    for folder in (out, tmp_path / "adapter"):  # one merged weight at a time is in memory
        handed = []

        def sized(path, leaf, handed=handed):
            assert not any(earlier() for earlier in handed), path
            handed.append(weakref.ref(leaf))
            return leaf.size

        source = find(str(folder))
        sizes = source.load(model, meshes.make_mesh("fsdp=-1"), each=sized)
        assert len(handed) == len(jax.tree.leaves(sizes))


@pytest.mark.slow
def test_runs_stand_on_runs_and_adapters_on_adapters(models, data, tmp_path):
    """A run goes on from a LoRA run's merged weights; another from the exported adapter itself."""
    own = {"lora.dora": True, "lora.modules_to_save": '["embed_tokens", "lm_head"]'}
    first, options = tmp_path / "first", {"export": True, "max_steps": 10, **own}
    _, params = train("sft", models / "llama", data, first, **adapted("llama", **options))
    config, algorithm = configure(
        "sft", first, data, tmp_path / "second", max_steps=4, **LORA,
        **{"lora.target_modules": "[q_proj]"},
    )  # fmt: skip
    setup = prepare(config, algorithm)
    adapter = adapter_for("llama", setup.model, dora=True, whole=True)
    wanted = logits(setup.model, adapter.merge(tiny.load(models / "llama")[1], params), rows_of())
    near(logits(setup.model, setup.start_weights(), rows_of()), wanted)
    run(config, algorithm, dry_run=False)
    origin = find(str(tmp_path / "second"))
    assert origin.adapter["base"]["name"] == str(first / "checkpoints/10")
    near(logits(setup.model, origin.load(setup.model, setup.mesh), rows_of()), wanted, 0.5)

    args = ("dpo", models / "llama", data)
    options = {"lora.adapter": first / "hf", "max_steps": 4, **own}
    resumed, _ = train(*args, tmp_path / "third", **adapted("llama", **options))
    assert resumed[0]["rewards/margins"] == 0  # the reference is what the policy starts from
    setup = prepare(*configure(*args, tmp_path / "x", **adapted("llama", **options)))
    same_bits(jax.device_get(setup.trainable.start()), params)
    for change, message in (
        ({"lora.r": 2}, "lora.r: is 2, but .* has 4;"),
        ({"lora.alpha": 4}, "lora.alpha: is 4.0, but .* has 8;"),
        ({"lora.rslora": True}, "lora.rslora: is True, but .* has False;"),
        ({"lora.dora": False}, "lora.dora: is False, but .* has True;"),
        ({"lora.modules_to_save": "[lm_head]"}, "modules_to_save: is .*, but the run trains"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(*configure(*args, tmp_path / "x", **adapted("llama", **options | change)))
    fewer = {"lora.target_modules": "[q_proj]"}
    with pytest.raises(WeightsError, match="which is not in lora.target_modules"):
        prepare(*configure(*args, tmp_path / "x", **adapted("llama", **options) | fewer))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_vectors_of_tokens_that_the_template_adds_are_trained_and_released(
    kind, models, data, tmp_path
):
    """One model ties its head, the other does not. DPO starts from the released adapter."""
    from peft import AutoPeftModelForCausalLM

    first, options = tmp_path / "first", {"data.template": "chatml", "max_steps": 4}
    options |= {"lora.quantize": "int8"} if kind == "llama" else {}
    _, params = train("sft", models / kind, data, first, **adapted(kind, export=True, **options))
    assert json.loads((first / "hf/export_report.json").read_text())["logits"]["compared"]
    new = [tiny.VOCAB, tiny.VOCAB + 1]
    written = json.loads((first / "hf/adapter_config.json").read_text())["trainable_token_indices"]
    assert written == (new if kind == "gpt2" else {"embed_tokens": new, "lm_head": new})
    origin = find(str(first))
    model = model_of(origin.config, "run")
    weights = origin.load(model, meshes.make_mesh("fsdp=-1"))
    table = {"gpt2": ("wte", "embedding"), "llama": ("embed_tokens", "embedding")}[kind]
    theirs = AutoPeftModelForCausalLM.from_pretrained(first / "hf")
    ids = np.array([[*new, 5, 9, *new, 7]])
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    near(logits(model, weights, tiny.layout(ids)), wanted)
    before = theirs.get_base_model().get_input_embeddings().original_module.weight.detach().numpy()
    after = np.asarray(weights["model"][table[0]][table[1]])
    np.testing.assert_array_equal(after[: tiny.VOCAB], before[: tiny.VOCAB])
    mean = before[: tiny.VOCAB].mean(0)
    assert all(1e-4 < np.abs(after[i] - mean).max() < 0.2 for i in new)  # begun there, and moved

    options |= {"lora.adapter": first / "hf"}
    if kind == "gpt2":  # the reference has the tied head without the adapter
        args = ("dpo", models / kind, data, tmp_path / "dpo")
        rows, _ = train(*args, **adapted(kind, **options))
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
        assert rows[0]["rewards/margins"] == 0
    setup = prepare(
        *configure("dpo", models / kind, data, tmp_path / "x", **adapted(kind, **options))
    )
    same_bits(jax.device_get(setup.trainable.start()), params)
    with pytest.raises(ConfigError, match="trainable_token_indices: is .* the run trains None"):
        prepare(
            *configure(
                "dpo",
                models / kind,
                data,
                tmp_path / "x",
                **adapted(kind, **options | {"data.template": "plain"}),
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, saved",
    [("gpt2", ["wte"]), ("llama", ["lm_head"])],
)
def test_whole_tables_grow_by_the_tokens_of_the_template(kind, saved, models, data, tmp_path):
    """The vectors of new tokens in a table that stays frozen are trained alone."""
    from peft import AutoPeftModelForCausalLM

    options = {"data.template": "chatml", "max_steps": 4, "export": True}
    options |= {"lora.modules_to_save": json.dumps(saved)}
    out, new = tmp_path / "run", [tiny.VOCAB, tiny.VOCAB + 1]
    train("sft", models / kind, data, out, **adapted(kind, **options))
    assert json.loads((out / "hf/export_report.json").read_text())["logits"]["compared"]
    written = json.loads((out / "hf/adapter_config.json").read_text())
    frozen = "embed_tokens" not in saved and kind == "llama"
    assert written["trainable_token_indices"] == (new if frozen else None)
    assert written["modules_to_save"] == sorted({*saved, "lm_head"})
    origin = find(str(out))
    model = model_of(origin.config, "run")
    weights = origin.load(model, meshes.make_mesh("fsdp=-1"))
    theirs = AutoPeftModelForCausalLM.from_pretrained(out / "hf")
    ids = np.array([[*new, 5, 9, *new, 7]])
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    near(logits(model, weights, tiny.layout(ids)), wanted)


def test_tables_that_peft_trained_apart_are_refused(models, tmp_path):
    """Of a tied model, as peft saves them without ensure_weight_tying."""
    model, _ = tiny.load(models / "gpt2")
    adapter = adapter_for("gpt2", model, whole=True)
    params = drawn(adapter)
    apart = peft.to_peft(adapter, params)
    head = "base_model.model.lm_head.weight"
    for tensor in (apart[head] + 1, None):
        tensors = {k: v for k, v in (apart | {head: tensor}).items() if v is not None}
        with pytest.raises(
            WeightsError, match="lm_head.weight differs from .* ensure_weight_tying"
        ):
            peft.from_peft(adapter, tensors, "here")
    folder = saved_adapter(tmp_path / "a", "gpt2", adapter, params)
    for names, message in ((["lm_head"], "trains .'lm_head', 'wte'. in full"), ("wte", "a list")):
        file = folder / peft.ADAPTER_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": names}))
        with pytest.raises(ConfigError, match=f"modules_to_save: .*{message}"):
            peft.read_peft(adapter, folder)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("bias", "all", "is not supported"),
        ("lora_bias", True, "is not supported"),
        ("use_a_new_method", {"of": 1}, "is not supported"),
        ("init_lora_weights", "pissa", "changes the base"),
        ("init_lora_weights", "pissa_niter_16", "changes the base"),
        ("init_lora_weights", "olora", "changes the base"),
        ("init_lora_weights", "loftq", "changes the base"),
        ("init_lora_weights", "corda", "changes the base"),
        ("init_lora_weights", ["gaussian"], "changes the base"),
    ],
)
def test_adapters_of_other_kinds_are_refused(key, value, message, models, tmp_path):
    model, _ = tiny.load(models / "llama")
    adapter = adapter_for("llama", model)
    folder = saved_adapter(tmp_path / "a", "llama", adapter, drawn(adapter))
    peft.read_peft(adapter, folder)
    file = folder / peft.ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"{key}: .*{message}"):
        peft.read_peft(adapter, folder)


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal", "eva"])
def test_adapters_whose_start_left_the_base_alone_are_read(how, models, tmp_path):
    from peft import LoraConfig as PeftConfig

    model, _ = tiny.load(models / "llama")
    adapter = adapter_for("llama", model)
    folder = saved_adapter(tmp_path / "a", "llama", adapter, drawn(adapter))
    everything = PeftConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"]).to_dict()
    everything = {k: v for k, v in everything.items() if k not in ("target_modules", "peft_type")}
    file = folder / peft.ADAPTER_CONFIG
    config = json.loads(file.read_text()) | everything | {"init_lora_weights": how}
    file.write_text(json.dumps(config))
    peft.read_peft(adapter, folder)


def test_weights_of_an_adapter_that_are_not_read_are_named(models, tmp_path):
    model, _ = tiny.load(models / "llama")
    adapter = adapter_for("llama", model)
    tensors = peft.to_peft(adapter, drawn(adapter))
    tensors["base_model.model.lm_head.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(WeightsError, match="lm_head.weight, and lora.modules_to_save does not"):
        peft.from_peft(adapter, tensors, "here")
    folder = saved_adapter(tmp_path / "a", "llama", adapter, drawn(adapter))
    (folder / peft.ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(WeightsError, match="adapter_model.bin is a pickle"):
        peft.read_peft(adapter, folder)


def test_dpo_refuses_dropout_that_its_reference_lacks():
    options = {"model": PolicyConfig("m"), "data": DataConfig(train=["x.jsonl"])}
    with pytest.raises(ConfigError, match="lora.dropout: would make policy and reference differ"):
        TrainDPO(**options, lora=LoraConfig(["q_proj"], dropout=0.1))
    TrainDPO(**options, lora=LoraConfig(["q_proj"]))


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind != "mixtral"])
def test_all_linear_is_what_peft_means_by_it(kind, models, tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model, _ = tiny.load(models / kind)
    adapter = adapter_for(kind, model, target_modules="all-linear")
    base, conv = AutoModelForCausalLM.from_pretrained(models / kind), kind == "gpt2"
    theirs = get_peft_model(
        base, PeftConfig(r=4, target_modules="all-linear", fan_in_fan_out=conv)
    ).state_dict()
    wanted = {n.replace(".default", "") for n in theirs if "lora_" in n}
    assert set(peft.to_peft(adapter, drawn(adapter))) == wanted
    folder = saved_adapter(tmp_path / "a", kind, adapter, drawn(adapter))
    written = json.loads((folder / peft.ADAPTER_CONFIG).read_text())["target_modules"]
    assert isinstance(written, list)
    assert adapter_for(kind, model, target_modules=written).targets == adapter.targets


def test_what_adapters_cannot_do_is_said_before_anything_is_written(models, data, tmp_path):
    options = {"lora.trainable_token_indices": "[3, 5000]"}
    with pytest.raises(ConfigError, match="5000 is beyond the 300 tokens"):
        prepare(
            *configure("sft", models / "llama", data, tmp_path / "x", **adapted("llama", **options))
        )
    options = {"model": PolicyConfig("m"), "data": DataConfig(train=["x.jsonl"])}
    both = LoraConfig(["q_proj"], trainable_token_indices=[3], modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="cannot be combined with lora.modules_to_save"):
        TrainDPO(**options, lora=both)
    tiny.save(tmp_path / "hf", tiny.CONFIGS["gpt2"])
    convert.from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"))
    with pytest.raises(ConfigError, match="has no adapters"):
        convert.to_hf(str(tmp_path / "ours"), str(tmp_path / "y"), merge=True)


@pytest.mark.slow
def test_a_plan_says_what_is_trained_and_held(models, data, tmp_path):
    reports, flops = {}, {}
    for how in (None, "nf4", "whole"):
        options = {"lora.quantize": how} if how == "nf4" else {}
        options |= {"lora.modules_to_save": "[lm_head]"} if how == "whole" else {}
        config, algorithm = configure(
            "dpo", models / "llama", data, tmp_path / "x", **adapted("llama", **options)
        )
        setup = prepare(config, algorithm)
        reports[how] = plan_report.describe(setup)
        count = f"{setup.adapter.parameter_count():,} trainable parameters"
        assert count in reports[how]
        targets = "self_attn.q_proj, self_attn.k_proj, self_attn.o_proj, mlp.down_proj"
        assert f"on {targets}" in reports[how]
        table = plan_report.table(setup)
        assert ("q_proj/kernel/nf4" in table) == (how == "nf4")
        assert "q_proj/lora_a" in table
        flops[how] = cost.flops_of(setup, False)
    assert "held in nf4" in reports["nf4"] and "held in float32" in reports[None]
    assert "mlp.down_proj, and all of lm_head; frozen" in reports["whole"]
    assert flops["whole"] - flops[None] == 2 * tiny.VOCAB * 16  # the gradient of the head
