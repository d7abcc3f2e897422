"""The steps of a run in order, from configuration to released folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

import easyaira
from easyaira.algorithms import rollouts
from easyaira.config.run import DryRun, RunConfig, changed
from easyaira.data import dataset
from easyaira.data.cache import keep_compiled
from easyaira.distributed import hosts, watchdog
from easyaira.distributed import mesh as meshes
from easyaira.distributed.cards import planned_devices, prepare_compiler
from easyaira.distributed.chips import memory_of
from easyaira.distributed.signals import StopSignal
from easyaira.errors import ConfigError, Preempted, folded
from easyaira.export import adapter_base, hub, release
from easyaira.export.hf_config import Facts, released, value_released
from easyaira.export.records import Records
from easyaira.plan import cost, on_policy
from easyaira.plan import report as plan_report
from easyaira.plan.hlo import lacking
from easyaira.plan.search import check_chip, search
from easyaira.plan.smaller import smaller
from easyaira.run import closing, provenance
from easyaira.run import folder as run_folder
from easyaira.run import report as run_report
from easyaira.run.samples import Samples
from easyaira.run.signs import Signs
from easyaira.storage.checkpoints import Checkpoints
from easyaira.train import energy, kernel_check, loader, loop, metrics, trackers
from easyaira.train import log as logs
from easyaira.train import step as steps
from easyaira.train.algorithm import Algorithm
from easyaira.train.best import Best
from easyaira.train.evaluation import Evaluate
from easyaira.train.log import Log, NoLog
from easyaira.train.record import Record
from easyaira.train.saving import Save, Stop
from easyaira.train.setup import Setup, prepare
from easyaira.train.step import abstract_state, init_state, resume_state

UNBALANCED = (
    "config.json has output_router_logits: true, for which transformers adds a loss that balances "
    "the experts; here sft.router_aux_loss adds it, and only to SFT"
)
REPORT_SECONDS = 20  # at least, between two reports during a run


def run(config: RunConfig, algorithm: Algorithm, *, dry_run: DryRun | None) -> None:
    """Run a training command, or plan it if `dry_run` is given."""
    if not dry_run:
        run_folder.refuse_taken(config)
    else:
        run_folder.refuse_foreign(config)
        if dry_run.topology:
            prepare_compiler()
    # a second signal kills the process even while it waits for the other hosts
    with StopSignal(watchdog.leave) as stop, hosts.joined(config.distributed):
        hosts.agree(provenance.made_with(config))
        energy.check(config.energy)
        trackers.check(config.report_to)
        if config.push_to_hub and not dry_run and hosts.first():
            hub.check(config.push_to_hub)
        watchdog.beat("reading model and data", bounded=False)
        if dry_run:
            return show(config, algorithm, dry_run)
        setup = prepare(config, algorithm)
        if hosts.several():  # samples the weights and resolves the reference
            hosts.agree(provenance.made_of(setup))
        keep_compiled(config.data.cache_dir)
        with setup.model.on(setup.mesh), memory_explained(config):
            setup, checked = kernel_check.choose(setup)
            print(folded(plan_report.describe(setup)), flush=True)
            if not config.optimizer.learning_rate:
                print("warning: optimizer.learning_rate is 0, so no weight will change", flush=True)
            switched = getattr(setup.model.config, "output_router_logits", False)
            if switched and not (algorithm.balanced or algorithm.scorer):
                print(folded(f"warning: {UNBALANCED}"), flush=True)
            if setup.adapter and config.export and (need := adapter_base.warning(setup.origin)):
                print(folded(f"warning: {need}"), flush=True)
            if setup.adapter and (start := setup.adapter.config.adapter):
                if moved := adapter_base.moved(start, setup.origin):
                    print(folded(f"warning: {moved}"), flush=True)
            for doubt in setup.template.doubts(setup.model.scorer):
                print(folded(f"warning: {doubt}"), flush=True)
            train(setup, algorithm, stop, checked)


@contextmanager
def memory_explained(config: RunConfig) -> Iterator[None]:
    """Turn an out-of-memory error into advice.

    Raises:
        ConfigError: replaces JAX's out-of-memory error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if (problem := lacking(error)) is None:
            raise
        raise ConfigError(
            f"{watchdog.doing()}: {problem} To save memory, use a larger "
            f"gradient_accumulation_steps (is {config.gradient_accumulation_steps}), "
            "model.gradient_checkpointing: full (is "
            f"{config.model.gradient_checkpointing}) or more devices over fsdp; --search tries "
            "them. The run then continues from its newest checkpoint"
        ) from error


def show(config: RunConfig, algorithm: Algorithm, dry_run: DryRun) -> None:
    """Print the plan of a run without running it."""
    devices = planned_devices(dry_run.topology, dry_run.memory)
    setup = prepare(config, algorithm, devices, planned=True)
    room = dry_run.memory or memory_of(setup.mesh.devices.flat[0])
    if dry_run.search:
        check_chip(setup, room)
    print(folded(plan_report.describe(setup)), flush=True)
    print(folded(plan_report.method(setup)), flush=True)
    with jax.default_matmul_precision(setup.model.compute.matmul_precision):
        plan = cost.measure(setup, algorithm)
        costs = folded(plan_report.show(setup, plan, room))
        print(f"{plan_report.table(setup)}\n\n{costs}", flush=True)
        if room and plan.program.memory > room and setup.mesh.devices.flat[0].platform == "gpu":
            print("to fit, counted:", flush=True)
            for line in smaller(setup, algorithm, room):
                print(folded(line), flush=True)
        if algorithm.on_policy:
            held = sum(plan.sizes[name] for name in ("weights", "optimizer", "frozen"))
            for line in on_policy.show(setup, plan.program, held, room):
                print(folded(line), flush=True)
        for line in search(setup, algorithm, room) if dry_run.search else ():
            print(line if line.startswith("propose") else folded(line), flush=True)


def train(setup: Setup, algorithm: Algorithm, stop: StopSignal, checked: Mapping[str, str]) -> None:
    """Start or resume training unless it is finished; then report and export.

    Args:
        checked: results of the kernel check, for the first row of metrics.jsonl.
    """
    config, folder = setup.config, Path(setup.config.output_dir)
    facts, began = released(setup), time.perf_counter()
    with run_folder.claimed(setup) as checkpoints:
        step = checkpoints.latest()
        released_before = hosts.share((folder / "hf").exists())
        done = step == setup.total_steps or run_folder.stopped_early(config, checkpoints, step)
        idle = done and (not config.export or released_before)
        if idle:
            idle = hosts.share(hosts.first() and run_folder.is_measured(folder, checkpoints, step))
        if step is not None:
            run_folder.write(setup, finished=done, idle=idle)
        if idle:
            print(f"run     {folder} is finished after {step} updates; nothing to do", flush=True)
            return
        with energy.track(config.energy if not done else None, folder):
            signs = Signs(setup)
            result = _updates(setup, algorithm, stop, checkpoints, facts, checked, signs)
        params, samples, step = result
        warnings = signs.new(_finish(setup, params, samples, facts, step, signs))
        rows, used = logs.read(folder / "metrics.jsonl"), energy.used(folder)
        rows = [row for row in rows if row["step"] <= step]  # of the released weights
        seconds = time.perf_counter() - began
        scorer = setup.model.scorer
        for line in closing.lines(rows, seconds, used, str(folder), scorer, warnings):
            print(folded(line), flush=True)


def _updates(
    setup: Setup,
    algorithm: Algorithm,
    signal: StopSignal,
    checkpoints: Checkpoints,
    facts: Facts,
    checked: Mapping[str, str],
    signs: Signs,
) -> tuple[Any, Samples, int]:
    """Run the remaining updates.

    Returns:
        the parameters without the optimizer state, to leave memory for the export's verification;
        the samples; and the update of those parameters.
    """
    config, folder = setup.config, Path(setup.config.output_dir)
    trainable, step = setup.trainable, checkpoints.latest()
    if step is None:
        params = trainable.start()
        state = init_state(params, setup.tx, setup.mesh)
        window = metrics.Window()
    else:
        target = abstract_state(trainable.target, setup.tx, setup.mesh)
        step, params, opt_state, _, saved = checkpoints.restore_latest(
            *trainable.saved(target.params, target.opt_state)
        )
        params, opt_state = trainable.restored(params, opt_state)
        print(f"run     continues {folder} after update {step}", flush=True)
        trainable.check(saved, str(folder))
        state = resume_state(step, params, opt_state, setup.mesh)
        window = metrics.Window(saved["window"])
    beginning = algorithm.begin(setup, trainable.weights(params), folder, step is None)
    del params  # donated by the first update
    until, mesh = setup.total_steps, setup.mesh
    batches = replace(setup.batches, known=beginning.known)
    held_out = setup.held_out and replace(setup.held_out, known=beginning.known_held_out)
    peak = metrics.peak_flops(mesh.devices.flat[0].device_kind)
    own, start = algorithm.on_policy, step or 0
    cycle = own.cycle if own else 1
    stop = Stop(signal, mesh, until, cycle)
    if own:
        source = own.source(setup, folder, start, stop.look_now)
    else:
        source = loader.Stored(batches, start, until, mesh)
    trainable.free_start()
    log = NoLog()
    if hosts.first():
        log = Log(
            folder,
            start,
            until,
            window.unmeasured,
            window.logged,
            trackers.Trackers(config, folder),
        )
    samples = Samples(setup, folder / "samples.json", start, log)
    loss_fn = trainable.loss_fn(algorithm.loss_fn(setup))
    options = trainable.compiler_options
    best = Best(config, window, partial(setattr, checkpoints.kept, "best"))
    train_step = steps.jit_train_step(loss_fn, setup.tx, state, options)

    def evaluated() -> None:
        for line in signs.new(report(setup, samples, signs)):
            log.say(line)

    try:
        state = loop.fit(
            state,
            trainable.frozen(beginning.frozen),
            source,
            step=lambda number, *args: train_step(*args, setup.dropout_key, setup.schedule(number)),
            until=until,
            evaluate=Evaluate(
                steps.jit_eval_step(loss_fn, options),
                held_out,
                mesh,
                every=config.eval_steps,
                until=until,
                summary=algorithm.summary,
                answer=samples,
                stop=stop,
                best=best,
                stage=log.stage,
                own=own and source.held_out,
                cycle=cycle,
            ),
            record=Record(
                log,
                window,
                source,
                start=start,
                every=config.logging_steps,
                until=until,
                facts={**beginning.metrics, **checked},
                schedule=setup.schedule,
                flops=cost.flops_of(setup, beginning.frozen is not None),
                peak=peak and peak * mesh.size,
                latest=checkpoints.latest,
                evaluated=run_report.AtMostEvery(REPORT_SECONDS, evaluated),
            ),
            save=Save(
                checkpoints,
                start=start,
                every=config.save_steps,
                until=until,
                meta=facts.to_meta()
                | trainable.to_meta()
                | {"easyaira": easyaira.__version__, "run": provenance.identity(setup)},
                seed=config.seed,
                cycle=cycle,
                saved=trainable.saved,
            ),
            stop=stop,
        )
        params, step = state.params, int(state.step)
        if best.exhausted:
            print(f"run     stopped early after update {step} of {until}", flush=True)
        if best.step is not None:
            print(f"best    {best.name} {best.record['value']:.4g}, of update {best.step}")
        if best.step not in (None, step):
            del params, state
            target, _ = trainable.saved(trainable.target, None)
            params, _ = trainable.restored(checkpoints.restore_params(best.step, target), None)
            step = best.step
    except Preempted:
        report(setup, samples, signs)
        raise
    finally:
        log.close()
        checkpoints.close()
    return params, samples, step


def _finish(
    setup: Setup, params: Any, samples: Samples, facts: Facts, step: int, signs: Signs
) -> Mapping[str, str]:
    """Write the report and export the parameters of update `step`; return the signs of the run."""
    config, folder = setup.config, Path(setup.config.output_dir)
    seen = report(setup, samples, signs)
    setup.trainable.free()
    if config.export:
        print(f"export  to {folder / 'hf'}", flush=True)
        own = meshes.make_mesh("fsdp=-1", jax.local_devices()) if hosts.several() else setup.mesh
        common = {
            "params": params,
            "tokenizer": setup.tokenizer,
            "mesh": own,
            "records": Records(folder, step),
        }
        if setup.critic:
            _export_value(setup, params["value"], folder / "value", common)
            common["params"] = params["policy"]
        if setup.adapter:
            exported = release.export_adapter(
                folder / "hf", adapter=setup.adapter, base=setup.origin, **common
            )
        else:
            exported = release.export(folder / "hf", model=setup.model, facts=facts, **common)
        if exported:
            print(folded(f"export  {release.summary(exported)}"), flush=True)
            report(setup, samples, signs)  # with links to the release
            if config.push_to_hub:
                url = hub.push(folder / "hf", config.push_to_hub, config.hub_private_repo)
                print(f"pushed  {url}", flush=True)
    print(f"done    {folder / 'report.html'}", flush=True)
    return seen


def _export_value(setup: Setup, params: Any, folder: Path, common: Mapping[str, Any]) -> None:
    """Export the value model as a token classifier with one label."""
    facts = value_released(setup)
    if facts is None:
        kind = setup.critic.origin.config["model_type"]  # type: ignore[union-attr]
        print(f"value   not exported: transformers has no token classifier of {kind}", flush=True)
        return
    own = {**common, "params": params, "records": None}
    exported = release.export(folder, model=setup.trainable.value, facts=facts, **own)
    if exported:
        print(f"value   {release.summary(exported)}, in {folder}", flush=True)


def report(setup: Setup, samples: Samples, signs: Signs) -> Mapping[str, str]:
    """Write report.html with the main facts of the run, on the first host; return the signs that it
    shows."""
    if not hosts.first():
        return {}
    config, data, folder = setup.config, setup.data, Path(setup.config.output_dir)
    used = energy.used(folder)
    last, points = setup.total_steps, min(setup.total_steps, 200)
    at = sorted({i * last // points for i in range(points + 1)})
    trained = setup.trainable.parameter_count()
    whole = trained == setup.model.parameter_count()
    sources = ", ".join(s.path for s in dataset.sources_of(config.data, config.data.train))
    return run_report.write(
        folder,
        title=folder.name,
        figures={} if used is None else {"energy": f"{used.kwh:.2g} kWh"},
        facts={
            "model": f"{config.model.name_or_path}, {setup.model.parameter_count():,} parameters",
            **({} if whole else {"trained": f"{trained:,} parameters"}),
            "data": f"{len(data.train):,} examples from {sources}",
            "held out": f"{len(data.held_out):,} examples" if data.held_out else "none",
            "updates": f"{setup.total_steps:,}, each of {config.train_batch_size} examples",
            "devices": f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}",
        },
        samples=samples.table(),
        completions=rollouts.read(folder / rollouts.COMPLETIONS),
        changed=changed(config),
        last=last,
        schedule=[(step, float(setup.schedule(max(step - 1, 0)))) for step in at],
        signs=signs.of,
    )
