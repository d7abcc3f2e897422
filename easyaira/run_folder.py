"""The run folder: whose it is, what was run in it, and with what."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import yaml

import easyaira
from easyaira import cli, optim, pretrained
from easyaira import config as configs
from easyaira.checkpoint import Checkpoints
from easyaira.data import report as data_report
from easyaira.errors import ConfigError, StorageError
from easyaira.prepare import Setup
from easyaira.report import write_file

# what may differ when a run is continued, since it does not change what is computed
MAY_CHANGE = """
    mesh output_dir resume export num_samples logging_steps eval_steps save_steps save_total_limit
    model.gradient_checkpointing data.cache_dir
""".split()
GROUPS_MAY_CHANGE = {"energy", "generation", "card"}


def claim(setup: Setup) -> Checkpoints:
    """Make the run folder ours, or make sure that it is; returns its checkpoints.

    Raises:
        ConfigError: it is another run's, holds something else, or nothing where a run must be.
        StorageError: it cannot be written.
    """
    config, folder = setup.config, Path(setup.config.output_dir)
    record = folder / "config.yaml"
    if record.exists():
        _compare(yaml.safe_load(record.read_text(encoding="utf-8")), setup, record)
    elif folder.exists() and (not folder.is_dir() or _strangers(folder)):
        raise ConfigError(f"output_dir: {folder} is not empty and holds no run; choose another")
    elif config.resume == "must":
        raise ConfigError(f"resume: there is no run in {folder}; check output_dir, or use auto")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = configs.to_dict(config) | {cli.PROVENANCE: provenance(setup)}
        write_file(record, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        data_report.write(folder, setup.data)
        if not setup.template.encoder:
            setup.tokenizer.chat_template = setup.template.jinja
        setup.tokenizer.save_pretrained(str(folder / pretrained.TOKENIZER))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error
    checkpoints = Checkpoints(
        folder / pretrained.CHECKPOINTS, keep=config.save_total_limit, write=True
    )
    if config.resume == "must" and checkpoints.latest() is None:
        raise ConfigError(f"resume: no finished checkpoint in {folder}; use auto to start anew")
    return checkpoints


def _strangers(folder: Path) -> list[Path]:
    """What lies in a folder besides the report of `easyaira.inspect`."""
    return [path for path in folder.iterdir() if path.name not in data_report.FILES]


def _compare(saved: Mapping[str, Any], setup: Setup, record: Path) -> None:
    """Refuse a folder whose run computes something else."""
    saved = dict(saved)
    fingerprint = saved.pop(cli.PROVENANCE, {}).get("data_fingerprint")
    then, now = (
        _flat({k: v for k, v in content.items() if k not in GROUPS_MAY_CHANGE})
        for content in (saved, configs.to_dict(setup.config))
    )
    for key in sorted((then.keys() | now.keys()) - set(MAY_CHANGE)):
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: the run in {record.parent} has {then.get(key)!r} and this command "
                f"{now.get(key)!r}; restore it to continue, or choose another output_dir"
            )
    if fingerprint != setup.data.report["fingerprint"]:
        raise ConfigError(
            f"data: the run in {record.parent} was trained on other rows than data.train gives "
            "now; restore them to continue, or choose another output_dir"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups of options as option names: {model: {dtype: x}} -> {model.dtype: x}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and key != "columns":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def provenance(setup: Setup) -> dict[str, Any]:
    """What this run is made with, for config.yaml."""
    packages = "jax jaxlib flax optax orbax-checkpoint transformers tokenizers numpy".split()
    source = Path(easyaira.__file__).parent
    git = ["git", "-C", str(source), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {
        "versions": {"python": platform.python_version(), "easyaira": easyaira.__version__}
        | {package: version(package) for package in packages},
        "git_commit": commit or None,
        "devices": {
            "kind": setup.mesh.devices.flat[0].device_kind,
            "count": setup.mesh.size,
            "mesh": {axis: int(size) for axis, size in setup.mesh.shape.items()},
            "processes": jax.process_count(),
        },
        "compute": setup.model.compute.dtype.name,
        "warmup_steps": optim.warmup_steps(setup.config.optimizer, setup.total_steps),
        "data_fingerprint": setup.data.report["fingerprint"],
        "model_commit": setup.origin.commit,
        "base_model": _base_model(setup),
        "parameters": setup.model.parameter_count(),
        "positions": setup.model.config.max_positions,
        "trainable_parameters": (setup.adapter or setup.model).parameter_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _base_model(setup: Setup) -> str | None:
    """The hub's model that this run goes back to, perhaps through earlier runs."""
    if setup.origin.commit:
        return setup.config.model.name_or_path
    record = setup.origin.folder / "config.yaml"
    if setup.origin.step is None or not record.exists():
        return None
    return yaml.safe_load(record.read_text(encoding="utf-8"))[cli.PROVENANCE].get("base_model")
