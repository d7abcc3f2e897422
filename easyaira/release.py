"""A trained model as a Hugging Face folder: weights, configs, tokenizer, card, and the proof.

Everything is written beside the target, read back and compared, and moved into place at the end, so
that a folder that does not verify is never left under its name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from easyaira import hosts, lora, watch, weights
from easyaira.chips import memory_of
from easyaira.errors import ConfigError, StorageError, WeightsError
from easyaira.models.registry import Model
from easyaira.pretrained import Pretrained

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea, in two lines.",
    "1 2 3 4 5 6 7 8 9 10",
)
TOLERANCE = 1e-4  # of logits, relative to the largest (of scores: or to 1), in float32


@dataclass(frozen=True)
class Facts:
    """What an export needs to know of a model beside its weights; checkpoints keep it.

    Attributes:
        config, generation_config: the files of these names.
        stored_dtypes: tensor name -> dtype its weights are stored with; "" stands for all others.
    """

    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    stored_dtypes: Mapping[str, str]

    def to_meta(self) -> dict[str, Any]:
        return asdict(self)


def generation_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json with these settings, as transformers reads it.

    Raises:
        ConfigError: transformers would refuse it.
    """
    from transformers import GenerationConfig

    # this mark would let transformers put config.json's settings in the place of these
    settings = {k: v for k, v in settings.items() if k != "_from_model_config"}
    sampling = {"temperature", "top_p", "top_k"} & settings.keys()
    if settings.get("do_sample") is False:
        settings = {k: v for k, v in settings.items() if k not in sampling}
    elif sampling:
        settings["do_sample"] = True  # transformers refuses settings that it would ignore
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"generation_config.json: transformers refuses it: {reason}") from error
    return settings


def export(
    folder: Path,
    *,
    model: Model,
    params: Any,
    facts: Facts,
    tokenizer: Any,
    mesh: Any,
    card: Callable[[dict[str, Any]], str],
    replace: bool = False,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write and verify a Hugging Face folder; returns what export_report.json says. All processes
    must call it; the first one writes, and returns it.

    Args:
        folder: the target; it appears only when all is verified.
        model, params: what is exported.
        facts: what the files beside the weights say.
        tokenizer: is saved with its chat template.
        mesh: where the written folder is loaded, for its logits; devices of this process alone.
        card: README.md, from what export_report.json says.
        replace: the folder may exist, and is replaced.
        dtype: for all tensors, instead of what `facts` says.

    Raises:
        StorageError: the folder exists, or cannot be written.
        WeightsError: the folder does not verify.
    """
    stored = {"": dtype} if dtype else facts.stored_dtypes
    tensors = weights.to_hf(
        params,
        model.rows,
        vocab_size=model.vocab_size,
        dtypes=lambda name: jnp.dtype(stored.get(name, stored[""])),
    )
    if not hosts.first():
        deque(tensors, maxlen=0)  # each is collected by all
        return {}
    with _beside(folder, replace) as new:
        written: dict[str, dict[str, Any]] = {}

        def noted() -> Iterator[tuple[str, np.ndarray]]:
            for name, tensor in tensors:
                written[name] = _described(tensor)
                yield name, tensor

        weights.save_folder(noted(), new)
        watch.beat("proving what was written", bounded=False)
        _write_json(new / "config.json", _with_dtype(facts.config, dtype))
        if facts.generation_config:
            _write_json(new / "generation_config.json", facts.generation_config)
        tokenizer.save_pretrained(str(new))
        report = {"tensors": written, "read_back": _verify(weights.open_folder(new), written, new)}
        report["logits"] = _compare_logits(
            new, model, tokenizer, lambda: Pretrained(str(new), new).load(model, mesh), mesh
        )
        _write_json(new / "export_report.json", report)
        (new / "README.md").write_text(card(report), encoding="utf-8")
    return report


def export_adapter(
    folder: Path,
    *,
    adapter: lora.Adapter,
    params: Any,
    base: Pretrained,
    tokenizer: Any,
    mesh: Any,
    card: Callable[[dict[str, Any]], str],
    replace: bool = False,
) -> dict[str, Any]:
    """Write and verify an adapter in PEFT's format; returns what export_report.json says. All
    processes must call it; the first one writes, and returns it.

    Its logits are compared on the base as it is stored, also where training held it in fewer bits.

    Args:
        folder: the target; it appears only when all is verified.
        adapter, params: what is exported, in float32.
        base: what it stands on, and will be loaded onto.
        tokenizer, mesh, card, replace: as for `export`.

    Raises:
        StorageError: the folder exists, or cannot be written.
        WeightsError: the folder does not verify.
    """
    at = base.location()
    tensors = adapter.to_peft(jax.tree.map(hosts.fetch, params))
    if not hosts.first():
        return {}
    with _beside(folder, replace) as new:
        written = {name: _described(tensor) for name, tensor in tensors.items()}
        watch.beat("proving what was written", bounded=False)
        file = new / lora.ADAPTER_WEIGHTS
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library makes it readable for its owner alone
        _write_json(new / lora.ADAPTER_CONFIG, adapter.peft_config(at["name"], at["commit"]))
        tokenizer.save_pretrained(str(new))
        report = {"tensors": written, "read_back": _verify(weights.open_file(file), written, new)}
        if adapter.config.quantize:
            report["read_back"] += (
                f"; it was trained on a base in {adapter.config.quantize} and is released for the "
                "weights as they are stored, which give other logits"
            )

        def load() -> Any:  # a head that the base has not got is drawn, and replaced
            params = base.load(adapter.model, mesh, head_key=jax.random.key(0))
            return adapter.merge(params, adapter.read_peft(new))

        if base.step is None:
            report["logits"] = _compare_logits(
                new, adapter.model, tokenizer, load, mesh, base.folder
            )
        else:
            why = "the base is a run folder; convert it with to_hf, or this run with --merge"
            report["logits"] = {"compared": False, "why": why}
        _write_json(new / "export_report.json", report)
        (new / "README.md").write_text(card(report), encoding="utf-8")
    return report


@contextmanager
def _beside(folder: Path, replace: bool) -> Iterator[Path]:
    """A new folder that takes the place of `folder` if all goes well, and is removed if not."""
    if folder.exists() and not replace and any(folder.iterdir()):
        raise StorageError(f"{folder}: is not empty; choose another folder")
    new = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json, which says how its weights are stored under one of two names."""
    if dtype is None:
        return dict(config)
    return dict(config) | {"dtype" if "dtype" in config else "torch_dtype": dtype}


def _hash(tensor: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8).data).hexdigest()


def _described(tensor: np.ndarray) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": tensor.dtype.name, "sha256": _hash(tensor)}


def _verify(
    found: Mapping[str, np.ndarray], written: Mapping[str, Mapping[str, Any]], folder: Path
) -> str:
    """Read every tensor back from the files and compare its hash with what was in memory."""
    wrong = set(found) ^ set(written)
    wrong |= {n for n in written if n in found and _hash(found[n]) != written[n]["sha256"]}
    if wrong:
        raise WeightsError(f"{folder}: {sorted(wrong)[:3]} differ from what was trained")
    return f"all {len(found)} tensors equal what was trained, bit for bit"


def _compare_logits(
    folder: Path,
    model: Model,
    tokenizer: Any,
    load: Callable[[], Any],
    mesh: Any,
    base: Path | None = None,
) -> dict[str, Any]:
    """Logits of the folder in PyTorch and in JAX, both in float32, on fixed prompts.

    Args:
        load: the folder's weights, as we read them onto `mesh`.
        base: the folder of the model that `folder` is an adapter of.
    """
    prompts = [tokenizer(t, add_special_tokens=model.scorer).input_ids[:64] for t in PROMPTS]
    prompts = [ids[: model.config.max_positions] for ids in prompts]
    needed = 5 * model.parameter_count()
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = memory_of(mesh.devices.flat[0])
    if room is not None and 4 * model.parameter_count() / mesh.size > 0.8 * room:
        why = f"needs {4 * model.parameter_count()} bytes on {mesh.size} devices of {room:.0f}"
        return {"compared": False, "why": why}
    for package in ("torch", "peft") if base else ("torch",):
        if importlib.util.find_spec(package) is None:
            return {"compared": False, "why": f"{package} is not installed"}
    if available < needed:
        return {"compared": False, "why": f"needs {needed} bytes of memory, there are {available}"}
    command = [sys.executable, "-m", "easyaira.verify", str(folder), json.dumps(prompts)]
    command += [str(base)] if base else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise WeightsError(f"{folder}: transformers cannot load it: {result.stderr.strip()[-500:]}")
    theirs = np.load(folder / "logits.npz")
    largest = difference = 0.0
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        loaded = load()
        for i, ids in enumerate(prompts):
            tokens = jnp.array([ids])
            layout = {"tokens": tokens, "positions": jnp.arange(len(ids))[None]}
            layout |= {"segment_ids": jnp.ones_like(tokens), "sides": jnp.zeros_like(tokens)}
            ours = np.asarray(_logits(model.with_dtype(jnp.float32), loaded, layout))
            largest = max(largest, float(np.abs(ours).max()))
            difference = max(difference, float(np.abs(ours - theirs[f"arr_{i}"]).max()))
    (folder / "logits.npz").unlink()
    if not difference <= TOLERANCE * (max(largest, 1) if model.scorer else largest):
        raise WeightsError(
            f"{folder}: logits in PyTorch differ by {difference:.2e} of at most {largest:.2e}"
        )
    return {"compared": True, "max_difference": difference, "largest_logit": largest}


def _logits(model: Model, params: Any, layout: Mapping[str, jax.Array]) -> jax.Array:
    """Of one text: [T, V], or a scorer's [1]."""
    if model.scorer:
        return model.score(params, layout, examples=1, answers=1)[0][0]
    hidden, head = model.apply(params, layout)
    return (hidden @ head)[0, :, : model.vocab_size]
