"""The sides of a training comparison, each measured on the same examples.

A side runs in its own process. It is built from the shared arguments (`work`, see training.py) and
from its own options, and has completed its warm-up when its constructor returns.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import tracing
from benchmarks.lengths import KINDS, synthetic, written_out
from easyaira.data.batches import Batch, Batches
from easyaira.data.examples import Examples
from easyaira.data.packing import Shape

MODELS = {  # config.json; missing fields have Hugging Face's defaults
    "gpt2-small": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 1024,
    },
    "gpt2-small-8k": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 1024,
        "vocab_size": 8192,
    },
    "gpt2-124m": {"model_type": "gpt2", "n_positions": 1024},
    "opt-125m": {
        "model_type": "opt",
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "word_embed_proj_dim": 768,
        "max_position_embeddings": 2048,
    },
    "tinyllama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-2-7b": {"model_type": "llama", "max_position_embeddings": 4096},
}
BETA, LEARNING_RATE = 0.1, 1e-5
PLANNED = 400  # updates of the run whose shapes are chosen; a round runs its first ones


class Side(NamedTuple):
    """A warm side of a comparison.

    Attributes:
        first: time.time() at the end of its first update.
        facts: figures that are equal in every round.
        run: run the updates of a round; returns wall seconds and CPU seconds.
        peak: peak memory in MiB, of the accelerator if there is one, otherwise of the process.
        trace: (folder) -> costs of a round, see tracing.costs.
    """

    first: float
    facts: dict[str, float | str | None]
    run: Callable[[], tuple[float, float]]
    peak: Callable[[], float]
    trace: Callable[[Path], list[dict[str, Any]]] | None = None


def max_length(work: Mapping[str, Any]) -> int:
    """max_length of runs on such data, limited to the model's positions."""
    model = MODELS[work["model"]]
    positions = model.get("n_positions") or model["max_position_embeddings"]
    return min(KINDS[work["lengths"]].max_length, positions)


def examples_of(work: Mapping[str, Any], updates: int = 0) -> Examples:
    """Examples of a round, or of so many updates, which begin with those of a round. They are equal
    for all sides and have the loss on answers only."""
    count = work["examples"] * max(updates, work["updates"])
    longest = min(KINDS[work["lengths"]].longest, max_length(work))
    answers = work.get("answers", 2) if work["task"] == "dpo" else 1
    with tempfile.TemporaryDirectory() as folder:  # its files are freed with the examples
        examples = synthetic(work["lengths"], count, answers, Path(folder), longest)
    examples.learned[:] = True
    for start, end in examples.bounds[:, :2]:
        examples.learned[start:end] = False
    return examples


def ours(work: Mapping[str, Any], options: Mapping[str, Any]) -> Side:
    """EasyAira's training step and loader, as in a run.

    Args:
        options: packing, share_prompt, dtype, gradient_checkpointing, attention, unroll_up_to;
            `written_out`: each pair of answers as an example (best_rest or all_pairs); `answers`:
            as in dpo.answers; `in_step`: compute the reference in every step; `naive`: pad to the
            recipe's length, compute full logits, and compute the reference in every step.
    """
    import jax
    import jax.numpy as jnp

    from easyaira.algorithms import sft
    from easyaira.algorithms.dpo import answer_scores, dpo
    from easyaira.algorithms.reference import make_score
    from easyaira.config.dpo import DPOConfig
    from easyaira.data.packing import attention_cost, compilation_cost, shares_prompt
    from easyaira.distributed import mesh as meshes
    from easyaira.distributed import sharding
    from easyaira.models.layers import Compute
    from easyaira.models.registry import model_of
    from easyaira.train import loader
    from easyaira.train.resolve import KERNELS, ROW_MULTIPLE, unroll_up_to

    updates, size, pairs = work["updates"], work["examples"], work["task"] == "dpo"
    examples = examples_of(work, PLANNED)
    if how := options.get("written_out"):
        whole, examples = len(examples), written_out(examples, how == "best_rest")
        size *= len(examples) // whole
    naive = options.get("naive", False)
    in_step = pairs and (naive or options.get("in_step", False))
    platform = jax.default_backend()
    compute = Compute(
        jnp.dtype(options.get("dtype", "bfloat16")),
        options.get("gradient_checkpointing", "none"),
        attention=options.get("attention", (*KERNELS.get(platform, ()), "xla")[0]),
    )
    share = shares_prompt(options.get("share_prompt", "auto"), examples, compute.attention)
    model = model_of(MODELS[work["model"]], work["model"], compute)
    compilation = compilation_cost(model.parameter_count(), platform)
    unrolled = unroll_up_to(platform, examples, compilation)
    compute = replace(
        compute,
        shared_prompt=examples.answers * share,
        unroll_up_to=options.get("unroll_up_to", unrolled),
    )
    model = replace(model, compute=compute)
    mesh = meshes.make_mesh("fsdp=-1")
    batches = Batches(
        examples,
        size,
        shards=meshes.data_shards(mesh),
        packing=options.get("packing", True),
        share_prompt=share,
        attention=attention_cost(model.config.width, model.config.heads, compute.attention),
        compilation=compilation,
        multiple=ROW_MULTIPLE.get(platform, 8),
    )
    if share and examples.answers > 2:  # as a run chooses
        batches = min(batches, replace(batches, share_prompt=False), key=Batches.sampled_cost)
    counts = {"examples": size, "answers": examples.answers}
    with model.on(mesh):
        shardings = sharding.shardings(model.shapes, model.rules, mesh)
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
        frozen = jax.tree.map(jnp.copy, params) if in_step else None
        if pairs and not in_step:
            score = make_score(partial(answer_scores, model, **counts))
            logps = np.zeros(examples.ranks.shape, np.float32)
            for ready in loader.ahead(batches, 0, updates, mesh):
                scored = np.asarray(score(params, ready.arrays).logps)
                logps[ready.batch.examples] = scored[tuple(ready.batch.slots.T)]
            known = {"ranks": examples.ranks} if examples.answers > 2 else {}
            batches = replace(batches, known={"ref_logps": logps, **known})
    if naive:
        one_a_row = replace(batches, packing=False, share_prompt=False)
        batches, loss_fn = Padded(one_a_row, max_length(work)), full_logits(model, examples.answers)
    elif pairs:
        reference = model if in_step else None
        config = DPOConfig(beta=BETA, answers=options.get("answers", "all_pairs"))
        loss_fn = dpo(model, config, **counts, reference=reference)
    else:
        loss_fn = sft.sft(model)
    return _stepping(model, batches, updates, loss_fn, params, frozen, mesh)


def _stepping(model, batches, count, loss_fn, params, frozen, mesh) -> Side:
    """Run the first updates of `batches`; each shape is a program, named for the trace."""
    import jax
    import optax

    from easyaira.config.algorithms import OptimizerConfig
    from easyaira.distributed.compiler import REPRODUCIBLE
    from easyaira.plan import cost
    from easyaira.train import loader, optimizer
    from easyaira.train import step as steps
    from easyaira.train.step import init_state

    tx = optimizer.make_optimizer(OptimizerConfig())
    named = jax.named_scope(tracing.OPTIMIZER)(tx.update)
    tx = optax.GradientTransformationExtraArgs(tx.init, named)
    train_step = steps.make_train_step(jax.named_scope(tracing.LOSS)(loss_fn), tx)
    rate = np.float32(LEARNING_RATE)
    programs: dict[Shape, Any] = {}
    positions: list[int] = []  # of every update so far
    tokens: list[int] = []
    with jax.set_mesh(mesh):
        state = init_state(params, tx, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def compiled(shape: Shape, arrays: Mapping[str, jax.Array]) -> Any:
        def step(*given):
            return train_step(*given)

        step.__name__ = program_name(shape)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        lowered = step.lower(state, frozen, arrays, None, rate)
        return lowered.compile(REPRODUCIBLE.get(jax.default_backend()))

    def updates(start: int, stop: int) -> None:
        nonlocal state
        with model.on(mesh):
            for ready in loader.ahead(batches, start, stop, mesh):
                shape = ready.batch.shape
                if shape not in programs:
                    programs[shape] = compiled(shape, ready.arrays)
                state, _ = programs[shape](state, frozen, ready.arrays, None, rate)
                positions.append(ready.batch.positions)
                tokens.append(ready.batch.num_tokens)
            jax.block_until_ready(state.step)

    def run() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        updates(0, count)
        return time.perf_counter() - wall, time.process_time() - cpu

    def peak() -> float:
        device = mesh.devices.flat[0].memory_stats() or {}
        return device.get("peak_bytes_in_use", 0) / 2**20 or peak_of_process()

    def trace(folder: Path) -> list[dict[str, Any]]:
        with tracing.recording(folder):
            run()
        texts = {program_name(shape): program.as_text() for shape, program in programs.items()}
        return tracing.costs(folder, texts, count)

    updates(0, 1)
    first = time.time()
    updates(1, count)
    of_a_round = sum(tokens)
    temporaries = [program.memory_analysis().temp_size_in_bytes for program in programs.values()]
    facts = {
        "tokens": of_a_round,
        "positions per token": sum(positions) / of_a_round,
        "temporaries MiB": max(temporaries) / 2**20,
        "operations per token": cost.flops_per_token(model, frozen is not None),
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
    }
    return Side(first, facts, run, peak, trace)


def peak_of_process() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def program_name(shape: Shape) -> str:
    return f"step_{shape.rows}x{shape.length}"


@dataclass(frozen=True)
class Padded:
    """Naive layout of updates: one sequence per row, each padded to `length`.

    Attributes:
        batches: the same updates without packing and without shared prompts.
    """

    batches: Batches
    length: int

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def examples(self) -> Examples:
        return self.batches.examples

    def __getitem__(self, update: int) -> Batch:
        """Arrays are [1, B x answers, length]: one micro-batch; answers of an example adjacent."""
        batch = self.batches[update]
        size, answers = len(batch.examples), self.examples.answers

        def padded(rows: np.ndarray) -> np.ndarray:
            rows = rows[0, : size * answers, : self.length]  # in the order of examples and answers
            return np.pad(rows, ((0, 0), (0, self.length - rows.shape[1])))[None]

        arrays = {name: padded(rows) for name, rows in batch.arrays.items()}
        shape = Shape(size * answers, self.length)
        return batch._replace(arrays=arrays, shape=shape, positions=shape.rows * shape.length)


def full_logits(model: Any, answers: int) -> Callable:
    """Naive loss: one forward pass per answer, with float32 logits for every position.

    DPO, with the reference computed in the step; with one answer, SFT."""
    import jax
    import jax.numpy as jnp

    from easyaira.losses import preference

    def logps_of(params, rows):  # [B]
        hidden, head = model.apply(params, rows)
        logits = hidden @ head[:, : model.vocab_size].astype(hidden.dtype)
        logps = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        logps = jnp.take_along_axis(logps, rows["tokens"][:, 1:, None], axis=-1)[..., 0]
        return (logps * rows["loss_mask"][:, 1:]).sum(-1)

    def loss_fn(params, frozen, batch, key):
        sides = [jax.tree.map(lambda array, i=i: array[i::answers], batch) for i in range(answers)]
        policy = [logps_of(params, rows) for rows in sides]
        if len(sides) == 1:
            return {"loss": (-policy[0].sum(), batch["loss_mask"].sum())}
        reference = [jax.lax.stop_gradient(logps_of(frozen, rows)) for rows in sides]
        chosen, rejected = (of - ref for of, ref in zip(policy, reference, strict=True))
        return {"loss": (preference.sigmoid(chosen, rejected, beta=BETA).sum(), len(chosen))}

    return loss_fn
