"""A run, from its configuration to its released folder, in the order in which things happen."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

import easyaira
from easyaira import card, lora, metrics, plan, release, report, run_folder, trainer
from easyaira.config import RunConfig
from easyaira.data import dataset
from easyaira.prepare import Algorithm, Setup, prepare
from easyaira.samples import Samples


def run(config: RunConfig, algorithm: Algorithm, *, dry_run: bool) -> None:
    """Do what the command line asks for."""
    with trainer.StopSignal() as stop:
        setup = prepare(config, algorithm)
        keep_compiled(config)
        with jax.set_mesh(setup.mesh):
            print(plan.describe(setup), flush=True)
            if dry_run:
                print(plan.plan(setup, algorithm), flush=True)
            else:
                train(setup, algorithm, stop)


def keep_compiled(config: RunConfig) -> None:
    """Let later runs on this machine read the programs that this one compiles, which are code, so
    in a folder that is the user's alone. JAX's own setting goes first."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = dataset.cache_folder(config.data, "programs", platform.node())
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def train(setup: Setup, algorithm: Algorithm, stop: trainer.StopSignal) -> None:
    """Train, or continue, or find that all is done; then report and export."""
    config, folder = setup.config, Path(setup.config.output_dir)
    checkpoints = run_folder.claim(setup)
    step = checkpoints.latest()
    if step == setup.total_steps and (not config.export or (folder / "hf").exists()):
        print(f"run     {folder} is finished after {step} updates; nothing to do", flush=True)
        return
    if step is None:
        params = setup.start()
        state = trainer.init_state(params, setup.tx, setup.mesh)
        window = metrics.Window()
    else:
        print(f"run     continues {folder} after update {step}", flush=True)
        target = trainer.abstract_state(setup.trained(), setup.tx, setup.mesh)
        params, opt_state, _, saved = checkpoints.restore(step, target.params, target.opt_state)
        if setup.adapter:
            lora.check_base(saved["lora"], setup.base.fingerprint, str(folder))
        state = trainer.resume_state(step, params, opt_state, setup.mesh)
        window = metrics.Window(saved["window"])
    frozen, known, known_held_out, before = algorithm.begin(
        setup, setup.weights(params), folder, step is None
    )
    samples = Samples(setup, folder / "samples.json")
    if step is None:
        samples.answer("before", setup.weights(params))
    del params  # the first update gives its memory away
    log = metrics.Log(folder, step or 0, setup.total_steps)
    try:
        state = trainer.fit(
            state,
            setup.frozen(frozen),
            loss_fn=setup.loss_fn(algorithm),
            tx=setup.tx,
            schedule=setup.schedule,
            batches=replace(setup.batches, known=known),
            held_out=setup.held_out and replace(setup.held_out, known=known_held_out),
            total_steps=setup.total_steps,
            config=config,
            mesh=setup.mesh,
            key=setup.dropout_key,
            flops_per_token=plan.flops_per_token(setup.model, frozen is not None, setup.adapter),
            before=before,
            window=window,
            log=log,
            checkpoints=checkpoints,
            meta=released(setup).to_meta() | adapted(setup) | {"easyaira": easyaira.__version__},
            stop=stop,
        )
    finally:
        log.close()
        checkpoints.close()
    params = state.params
    del frozen, state  # the proof of the export needs the memory
    samples.answer("after", setup.weights(params))
    write_report(setup, samples)
    vars(setup).pop("base", None)  # and here, too
    if config.export:
        print(f"export  to {folder / 'hf'}", flush=True)
        common = {
            "params": params,
            "tokenizer": setup.tokenizer,
            "mesh": setup.mesh,
            "card": card.of_run(folder),
            "replace": True,
        }
        if setup.adapter:
            proof = release.export_adapter(
                folder / "hf", adapter=setup.adapter, base=setup.origin, **common
            )
        else:
            proof = release.export(
                folder / "hf", model=setup.model, facts=released(setup), **common
            )
        print(f"export  {proof['read_back']}; logits: {proof['logits']}", flush=True)
    print(f"done    {folder / 'report.html'}", flush=True)


def adapted(setup: Setup) -> dict[str, Any]:
    """What a checkpoint says of its adapters, if that is what it holds."""
    if setup.adapter is None:
        return {}
    base = setup.origin.location()
    return {"lora": lora.to_record(setup.adapter, base, setup.base.fingerprint)}


def released(setup: Setup) -> release.Facts:
    """What the files beside the weights will say: the original's words, and what the run changed.

    Weights are stored as they were in the model that the run began with.
    """
    random = setup.config.model.init == "random"
    dtypes = {"": "float32"} if random else setup.origin.stored_dtypes()
    config: dict[str, Any] = dict(setup.origin.config) | {"vocab_size": setup.model.vocab_size}
    config["dtype" if "dtype" in config else "torch_dtype"] = dtypes[""]
    generation = dict(setup.origin.generation_config)
    ends = list(setup.template.end_ids)
    if setup.template.added:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(setup.tokenizer, name) for name in names}
        config |= ids
        generation |= ids
    else:
        stored = generation.get("eos_token_id", [])
        stored = stored if isinstance(stored, list) else [stored]
        ends += [token for token in stored if token is not None and token not in ends]
    generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if not generation.get("do_sample") and {"temperature", "top_p", "top_k"} & generation.keys():
        generation["do_sample"] = True  # transformers refuses settings that it would ignore
    return release.Facts(config, generation, dtypes)


def write_report(setup: Setup, samples: Samples) -> None:
    """report.html, with the facts that people ask for first."""
    config, data = setup.config, setup.data
    report.write(
        Path(config.output_dir),
        title=Path(config.output_dir).name,
        facts={
            "model": f"{config.model.name_or_path}, {setup.model.parameter_count():,} parameters",
            "trained": f"{(setup.adapter or setup.model).parameter_count():,} parameters",
            "data": f"{len(data.train)} examples from {config.data.train}",
            "held out": len(data.held_out) if data.held_out else "none",
            "updates": f"{setup.total_steps} of {config.train_batch_size} examples",
            "devices": f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}",
        },
        samples=samples.rows,
    )
