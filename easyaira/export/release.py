"""Export of a trained model as a Hugging Face folder: weights, configs, tokenizer, card, report.

Files are written to a temporary folder beside the target, read back and compared. A folder that
fails verification never appears under the target's name. `easyaira verify` can check a released
folder against its proof.json at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.distributed import hosts, watchdog
from easyaira.errors import WeightsError
from easyaira.export import adapter_base, card, proof, torch_check
from easyaira.export.hf_config import Facts, with_dtype
from easyaira.export.records import Records
from easyaira.export.replace import replacing
from easyaira.hf import safetensors, transfer
from easyaira.hf.lazy import Lazy
from easyaira.lora import peft
from easyaira.lora.adapter import Adapter
from easyaira.models.model import Model
from easyaira.storage import pretrained
from easyaira.storage.base import load_resized
from easyaira.storage.pretrained import Pretrained
from easyaira.storage.tokenizers import save_tokenizer


def export(
    folder: Path,
    *,
    model: Model,
    params: Any,
    facts: Facts,
    tokenizer: Any,
    mesh: Any,
    records: Records | None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write and verify a Hugging Face folder; returns the content of export_report.json.

    Every process must call this. The first one writes; the others return {}.

    Args:
        folder: the target, see `replacing`; it appears only after verification.
        model, params: the model to export.
        facts: content of the configs, and stored dtypes.
        tokenizer: saved with its chat template.
        mesh: devices of this process only, onto which the folder is loaded to compare logits.
        records: what the model card and proof.json quote; None: neither is written, as for a value
            model.
        dtype: stored dtype of all tensors, overriding `facts`.

    Raises:
        StorageError: the folder cannot be written.
        WeightsError: verification failed.
    """
    stored = {"": dtype} if dtype else facts.stored_dtypes
    names = model.architecture.saved
    of_modules = transfer.lazy_to_hf(
        params,
        model.rows,
        vocab_size=model.vocab_size,
        dtypes=lambda name: jnp.dtype(stored.get(names.get(name, name), stored[""])),
    )
    tensors = ((names.get(name, name), tensor) for name, tensor in of_modules)
    if not hosts.first():
        for _, tensor in tensors:
            tensor.read()  # every process takes part in each gather
        return {}
    with replacing(folder) as new:
        config = with_dtype(facts.config, dtype)
        report = _write_model(new, tensors, config, facts.generation_config, tokenizer)
        report["logits"] = torch_check.compare_logits(
            new, model, tokenizer, lambda: Pretrained(str(new), new).load(model, mesh), mesh
        )
        _write_records(new, report, records)
    return report


def copy(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: Any,
) -> str:
    """Write stored tensors, as they are, to a Hugging Face folder of their own, and verify it;
    returns what was verified, in one line.

    Raises:
        StorageError: the folder cannot be written.
        WeightsError: verification failed.
    """
    lazy = ((name, Lazy(t.shape, t.dtype, partial(iter, [t]))) for name, t in tensors.items())
    with replacing(folder) as new:
        written = _write_model(new, lazy, config, generation_config, tokenizer)["tensors"]
    return f"all {len(written)} tensors equal the stored ones bit for bit"


def _write_model(
    new: Path,
    tensors: Iterable[tuple[str, Lazy]],
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: Any,
) -> dict[str, Any]:
    """Write weights, configs and tokenizer, and read the weights back; returns the entries of
    export_report.json about them."""
    written: dict[str, dict[str, Any]] = {}

    def recorded(name: str, tensor: np.ndarray) -> np.ndarray:
        written[name] = proof.described(tensor)
        return tensor

    lazy = ((name, tensor.then(partial(recorded, name))) for name, tensor in tensors)
    safetensors.save_folder(lazy, new)
    watchdog.beat("verifying the export", bounded=False)
    _write_json(new / "config.json", config)
    if generation_config:
        _write_json(new / "generation_config.json", generation_config)
    save_tokenizer(tokenizer, new)
    read_back = _verify(safetensors.open_folder(new), written, new)
    return {"tensors": written, "read_back": read_back}


def export_adapter(
    folder: Path,
    *,
    adapter: Adapter,
    params: Any,
    base: Pretrained,
    tokenizer: Any,
    mesh: Any,
    records: Records,
) -> dict[str, Any]:
    """Write and verify an adapter in PEFT's format; returns the content of export_report.json.

    Every process must call this. The first one writes; the others return {}.

    Logits are compared on the full-precision base, even if training used a quantised one.

    Args:
        folder: the target; it appears only after verification.
        adapter, params: the adapter to export, in float32.
        base: the base model, onto which users load the adapter.
        tokenizer, mesh, records: see `export`.

    Raises:
        StorageError: the folder cannot be written.
        WeightsError: verification failed.
    """
    tensors = peft.to_peft(adapter, jax.tree.map(hosts.fetch, params))
    if not hosts.first():
        return {}
    release = adapter_base.compared(base, adapter.model, mesh)
    base, at = release or base, (release or base).location()
    with replacing(folder) as new:
        written = {name: proof.described(tensor) for name, tensor in tensors.items()}
        watchdog.beat("verifying the export", bounded=False)
        file = new / peft.ADAPTER_WEIGHTS
        safetensors.save_file(tensors, file)
        _write_json(new / peft.ADAPTER_CONFIG, peft.peft_config(adapter, at["name"], at["commit"]))
        save_tokenizer(tokenizer, new)
        report = {
            "tensors": written,
            "read_back": _verify(safetensors.open_file(file), written, new),
        }
        if adapter.config.quantize:
            report["read_back"] += (
                f"; trained on a base in {adapter.config.quantize}, so expect slightly different "
                "logits on the full-precision base"
            )

        def load() -> Any:  # a missing head is initialised, then replaced
            params = load_resized(base, adapter.model, mesh)
            return adapter.merge(params, peft.read_peft(adapter, new))

        first = ""
        if release is not None:
            report["logits"] = torch_check.compare_logits(
                new, adapter.model, tokenizer, load, mesh, base.folder
            )
        else:
            place = f"{base.folder.resolve().name}/{pretrained.CHECKPOINTS}/{base.step}"
            command = adapter_base.to_convert(base, place)
            first = f"`{command}`, and set `base_model_name_or_path` in adapter_config.json to BASE"
            why = f"peft cannot load the base, a run folder; first run {first}"
            report["logits"] = {"compared": False, "why": why.replace("`", "")}
        _write_records(new, report, records, proof.of_base(base), first)
    return report


def _write_records(
    folder: Path,
    report: dict[str, Any],
    records: Records | None,
    base: Mapping[str, Any] | None = None,
    first: str = "",
) -> None:
    """Write model card, proof.json and export_report.json, which leaves the prompts out. `first` is
    what a user of the folder must do before loading it."""
    if records is not None:
        (folder / proof.CARD).write_text(card.text(records, report, first), encoding="utf-8")
        _write_json(folder / proof.FILE, proof.write(folder, report, records, base))
    report["logits"].pop("prompts", None)
    _write_json(folder / proof.REPORT, report)


def summary(report: Mapping[str, Any]) -> str:
    """What was verified, in one line."""
    logits = report["logits"]
    if not logits["compared"]:
        return f"{report['read_back']}; PyTorch logits not compared: {logits['why']}"
    return f"{report['read_back']}; PyTorch logits within {logits['max_difference']:.1e}"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _verify(
    stored: Mapping[str, np.ndarray], written: Mapping[str, Mapping[str, Any]], folder: Path
) -> str:
    """Compare the hash of every stored tensor with that of the tensor written."""
    wrong = set(stored) ^ set(written)
    wrong |= {
        n
        for n in written
        if n in stored and safetensors.tensor_hash(stored[n]) != written[n]["sha256"]
    }
    if wrong:
        raise WeightsError(
            f"{folder}: {sorted(wrong)[:3]} differ from the trained tensors; is the disk sound?"
        )
    rounded = proof.rounded(written)
    return (
        f"all {len(stored)} tensors equal the trained ones{rounded and rounded + ','} bit for bit"
    )
