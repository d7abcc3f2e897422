"""proof.json of a release: what was released, what it was made from, and what was compared.

export_report.json stays beside it, since users' scripts read it; proof.json holds the same hashes
of tensors, and everything that `easyaira verify` needs. Local paths are private: only names are
kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import easyaira
from easyaira.config.run import GROUPS_MAY_CHANGE, MAY_CHANGE, PROVENANCE
from easyaira.errors import ConfigError
from easyaira.export import card
from easyaira.export.records import Records, public
from easyaira.files import parse_json, read_file, read_json
from easyaira.hf import safetensors
from easyaira.storage.integrity import hash_of
from easyaira.storage.pretrained import Pretrained

FILE = "proof.json"
REPORT = safetensors.REPORT
CARD = "README.md"
KEPT_BYTES = 2**16  # JSON files up to this size are kept whole, to name the key that changed
FILE_BYTES = 2**30
READ = {".json", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt", ".py"}


def write(
    folder: Path, report: Mapping[str, Any], records: Records, base: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Content of proof.json for a folder whose other files are in place.

    Args:
        report: content of export_report.json, with the prompts of `compare_logits`.
        records: the run, or converted model, that the weights come from.
        base: see `of_base`; None for a whole model.
    """
    logits = report["logits"]
    proof = {
        "format": 1,
        "tensors": report["tensors"],
        "files": {name: _described(folder / name) for name in files(folder)},
        "card": card.stated((folder / CARD).read_text(encoding="utf-8")),
        "compared": {
            "tensors": "every tensor, read back from the folder, with the trained one"
            + rounded(report["tensors"]),
            "tensors_tolerance": 0,
            "logits": "transformers' with EasyAira's, in float32, on the tokens of `prompts`",
            "logits_tolerance": logits.get("tolerance"),
        },
        "logits": logits,
        "base": base,
        "released_with": {"easyaira": easyaira.__version__, "code_sha256": code_hash()},
        "run": of_run(records) if records.trained else None,
        "again": {
            "check this folder": "easyaira verify FOLDER",
            "write it again": "easyaira convert to_hf RUN FOLDER",
        },
    }
    if records.trained:
        proof["again"]["train again"] = (
            f"easyaira {records.algorithm} --config FILE, with the options of run.configuration, "
            "the data of run.data, and the versions and commit of run.code"
        )
    return proof | {"sha256": hash_of(proof)}


def read(folder: Path) -> dict[str, Any]:
    """Content of a folder's proof.json.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    file = folder / FILE
    if not file.exists():
        raise ConfigError(
            f"{folder}: holds no {FILE}, so there is nothing to verify it with; name a release, or "
            "write it again with easyaira convert to_hf"
        )
    proof = read_json(file)
    if proof.get("format") != 1:
        raise ConfigError(f"{file}: format is {proof.get('format')!r}, expected 1; update EasyAira")
    return proof


def intact(proof: Mapping[str, Any]) -> bool:
    """Whether a proof is as it was written."""
    written = {key: value for key, value in proof.items() if key != "sha256"}
    return proof.get("sha256") == hash_of(written)


def of_run(records: Records) -> dict[str, Any]:
    """Entry `run`: configuration, data, code and figures of the training."""
    config, made = records.config, records.config[PROVENANCE]
    before, after = records.held_out
    return {
        "configuration": _public(_deciding(config)),
        "configuration_sha256": hash_of(_deciding(config)),
        "data": {
            "fingerprint": made["data_fingerprint"],
            "sources": [{"name": name, "split": split} for name, _, split in records.sources()],
        },
        "start": {
            "name": public(config["model"]["name_or_path"]),
            "commit": made.get("model_commit"),
            "sampled_sha256": made.get("initial_weights"),
        },
        "code": {
            "versions": made["versions"],
            "git_commit": made["git_commit"],
            "code_sha256": made.get("code_sha256"),
            "devices": made["devices"],
        },
        "updates": records.step,
        "metrics": {"before": before, "after": after, "last": records.last},
    }


def of_base(base: Pretrained) -> dict[str, Any]:
    """Entry `base`: the model that an adapter is for."""
    at = base.location()
    return {"name": public(at["name"]), "commit": at["commit"], "sha256": base_hash(base)}


def base_hash(base: Pretrained) -> str:
    """Hash of the files of a base: of every stored tensor, or of a checkpoint's record."""
    if base.step is not None:
        return base.sample()
    tensors = safetensors.open_folder(base.folder)
    lines = (f"{name} {safetensors.tensor_hash(tensors[name])}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def files(folder: Path) -> list[str]:
    """Files that programs read, except weights and card, which have entries of their own."""
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    own = {FILE, REPORT}
    return sorted(
        path.relative_to(folder).as_posix()
        for path in paths
        if path.suffix in READ and path.name not in own and not _weights(path) and path.is_file()
    )


def _weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")


def file_hash(path: Path) -> str:
    return hashlib.sha256(read_file(path, FILE_BYTES)).hexdigest()


def _described(path: Path) -> dict[str, Any]:
    content = read_file(path, FILE_BYTES)
    kept = {}
    if path.suffix == ".json" and len(content) <= KEPT_BYTES:
        kept["content"] = parse_json(content)
    return {"sha256": hashlib.sha256(content).hexdigest(), **kept}


def rounded(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """How the stored tensors were rounded, in words; empty if all are float32, as in training."""
    dtypes = sorted({entry["dtype"] for entry in tensors.values()} - {"float32"})
    return f", rounded to {' and '.join(dtypes)}" if dtypes else ""


def described(tensor: np.ndarray) -> dict[str, Any]:
    """Entry of a tensor."""
    shape = list(tensor.shape)
    return {"shape": shape, "dtype": tensor.dtype.name, "sha256": safetensors.tensor_hash(tensor)}


@cache
def code_hash() -> str:
    """SHA-256 of the source files of EasyAira."""
    source = Path(easyaira.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*source.rglob("*.py"), *source.rglob("*.jinja")]):
        digest.update(str(path.relative_to(source)).encode() + path.read_bytes())
    return digest.hexdigest()


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide the trained weights."""
    left_out = GROUPS_MAY_CHANGE | {PROVENANCE}

    def kept(value: Any, prefix: str) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: kept(inner, f"{prefix}{key}.")
            for key, inner in value.items()
            if f"{prefix}{key}" not in MAY_CHANGE and f"{prefix}{key}" not in left_out
        }

    return kept(config, "")


def _public(value: Any) -> Any:
    """The same options with names instead of local paths."""
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return public(value) if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    """Whether an option names a file, and is not a text with a slash in it."""
    if "/" not in text or "\n" in text or "{" in text:
        return False
    return text.startswith(("/", "~", ".")) or not re.search(r"\s", text) or Path(text).exists()
