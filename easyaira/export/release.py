"""A trained model as a Hugging Face folder: weights, configs, tokenizer, card, and the proof.

Everything is written beside the target, read back and compared, and moved into place at the end, so
that a folder that does not verify is never left under its name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from easyaira.distributed import hosts, watchdog
from easyaira.errors import StorageError, WeightsError
from easyaira.export import torch_check
from easyaira.export.hf_config import Facts, with_dtype
from easyaira.hf import safetensors, transfer
from easyaira.lora import peft
from easyaira.lora.adapter import Adapter
from easyaira.models.model import Model
from easyaira.storage.pretrained import Pretrained


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
    tensors = transfer.to_hf(
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

        safetensors.save_folder(noted(), new)
        watchdog.beat("proving what was written", bounded=False)
        _write_json(new / "config.json", with_dtype(facts.config, dtype))
        if facts.generation_config:
            _write_json(new / "generation_config.json", facts.generation_config)
        tokenizer.save_pretrained(str(new))
        report = {
            "tensors": written,
            "read_back": _verify(safetensors.open_folder(new), written, new),
        }
        report["logits"] = torch_check.compare_logits(
            new, model, tokenizer, lambda: Pretrained(str(new), new).load(model, mesh), mesh
        )
        _write_json(new / "export_report.json", report)
        (new / "README.md").write_text(card(report), encoding="utf-8")
    return report


def export_adapter(
    folder: Path,
    *,
    adapter: Adapter,
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
    tensors = peft.to_peft(adapter, jax.tree.map(hosts.fetch, params))
    if not hosts.first():
        return {}
    with _beside(folder, replace) as new:
        written = {name: _described(tensor) for name, tensor in tensors.items()}
        watchdog.beat("proving what was written", bounded=False)
        file = new / peft.ADAPTER_WEIGHTS
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library makes it readable for its owner alone
        _write_json(new / peft.ADAPTER_CONFIG, peft.peft_config(adapter, at["name"], at["commit"]))
        tokenizer.save_pretrained(str(new))
        report = {
            "tensors": written,
            "read_back": _verify(safetensors.open_file(file), written, new),
        }
        if adapter.config.quantize:
            report["read_back"] += (
                f"; it was trained on a base in {adapter.config.quantize} and is released for the "
                "weights as they are stored, which give other logits"
            )

        def load() -> Any:  # a head that the base has not got is drawn, and replaced
            params = base.load(adapter.model, mesh, head_key=jax.random.key(0))
            return adapter.merge(params, peft.read_peft(adapter, new))

        if base.step is None:
            report["logits"] = torch_check.compare_logits(
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
