"""Provenance of a run: versions, code, data, devices."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import easyaira
from easyaira.config.run import PROVENANCE, RunConfig, to_dict
from easyaira.errors import StorageError
from easyaira.export.proof import code_hash
from easyaira.files import read_yaml
from easyaira.hf import safetensors
from easyaira.lora.peft import ADAPTER_WEIGHTS
from easyaira.storage import pretrained
from easyaira.train import optimizer
from easyaira.train.setup import Setup


def identity(setup: Setup) -> dict[str, Any]:
    """Identity of a run, for its checkpoints: configuration, fingerprint of the data, and samples
    of the weights that it starts from."""
    fingerprint = setup.data.report["fingerprint"]
    return to_dict(setup.config) | {"data_fingerprint": fingerprint} | started_from(setup)


def started_from(setup: Setup) -> dict[str, str | None]:
    """Samples of the initial weights, of the initial adapter, and of the weights of reference and
    reward models."""
    random = setup.config.model.init == "random"
    name = getattr(setup.config.model, "ref_name_or_path", None)  # DPO and on-policy
    adapter = setup.config.lora and setup.config.lora.adapter
    file = pretrained.find(adapter).folder / ADAPTER_WEIGHTS if adapter else None
    samples = {
        "initial_weights": None if random else setup.origin.sample(),
        "initial_adapter": file and pretrained.sampled(safetensors.open_file(file)),
        "reference_weights": pretrained.find(name).sample() if name else None,
    }
    if rl := getattr(setup.config, "rl", None):
        for key, names in (("reward", rl.rewards), ("eval_reward", rl.eval_rewards or ())):
            models = [pretrained.find(name).sample() for name in names if ":" not in name]
            samples[f"{key}_weights"] = " ".join(models) or None
    return samples


def completed(saved: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The options of a run as plain values. Options that did not exist when it began get their
    defaults, which keep the behaviour of that time.

    Args:
        saved: options of the same kind of run as `config`, from `to_dict` of any version.
    """
    full = dict(saved)
    for option in fields(config):
        if option.name not in full:
            if option.default_factory is not MISSING:
                full[option.name] = _plain(option.default_factory())
            elif option.default is not MISSING:
                full[option.name] = _plain(option.default)
            continue
        old, now = full[option.name], getattr(config, option.name)
        if isinstance(old, list) and isinstance(now, list) and len(old) == len(now):
            full[option.name] = [_completed(*both) for both in zip(old, now, strict=True)]
        else:
            full[option.name] = _completed(old, now)
    return full


def _completed(saved: Any, now: Any) -> Any:
    """A group of options, completed; anything else as it is."""
    return completed(saved, now) if isinstance(saved, Mapping) and is_dataclass(now) else saved


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value) if is_dataclass(value) else value))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten groups of options to option names: {model: {dtype: x}} -> {model.dtype: x}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and key != "columns":
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def made_with(config: RunConfig) -> dict[str, Any]:
    """Facts that must agree on all hosts before anything is read: options, versions, code."""
    options = {k: v for k, v in to_dict(config).items() if k != "distributed"}
    return (
        flattened(options)
        | {f"version of {name}": number for name, number in _versions().items()}
        | {"code of easyaira (sha256)": code_hash()[:16]}
        | {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
        | {"devices": [jax.local_devices()[0].device_kind, jax.local_device_count()]}
    )


def made_of(setup: Setup) -> dict[str, Any]:
    """Facts that must agree on all hosts before anything is computed: the data, the model."""
    return {
        "fingerprint of the data": setup.data.report["fingerprint"],
        "tokenizer and template": setup.template.fingerprint(),
        "config.json of the model": dict(setup.origin.config),
        "commit of the model": setup.origin.commit,
        "weights of the model": started_from(setup),
        "updates": setup.total_steps,
        "rows and lengths": [list(shape) for shape in setup.batches.shapes],
    }


def _versions() -> dict[str, str]:
    packages = "jax jaxlib flax optax orbax-checkpoint transformers tokenizers numpy".split()
    return {"python": platform.python_version(), "easyaira": easyaira.__version__} | {
        package: version(package) for package in packages
    }


def provenance(setup: Setup) -> dict[str, Any]:
    """Provenance of this run, for config.yaml."""
    source = Path(easyaira.__file__).parent
    git = ["git", "-C", str(source), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {
        "versions": _versions(),
        "git_commit": commit or None,
        "code_sha256": code_hash(),
        "devices": {
            "kind": setup.mesh.devices.flat[0].device_kind,
            "count": setup.mesh.size,
            "mesh": {axis: int(size) for axis, size in setup.mesh.shape.items()},
            "processes": jax.process_count(),
        },
        "compute": setup.model.compute.dtype.name,
        "warmup_steps": optimizer.warmup_steps(setup.config.optimizer, setup.total_steps),
        "data_fingerprint": setup.data.report["fingerprint"],
        "model_commit": setup.origin.commit,
        **started_from(setup),
        "base_model": _base_model(setup),
        "parameters": setup.model.parameter_count(),
        "positions": setup.model.config.max_positions,
        "trainable_parameters": setup.trainable.parameter_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _base_model(setup: Setup) -> str | None:
    """Hub model that this run descends from, directly or through earlier runs."""
    if setup.origin.commit:
        return setup.config.model.name_or_path
    record = setup.origin.folder / "config.yaml"
    if setup.origin.step is None or not record.exists():
        return None
    made = read_yaml(record, error=StorageError).get(PROVENANCE)
    return made.get("base_model") if isinstance(made, dict) else None
