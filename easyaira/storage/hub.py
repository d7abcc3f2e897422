"""Models on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyaira.errors import ConfigError
from easyaira.hf import safetensors

TEXTS = (".json", ".jinja", ".model", ".txt")  # endings of the files to read besides the weights


def download(name: str, revision: str | None, *, weights_wanted: bool) -> Path:
    """Folder of a model's files in the hub's cache; missing ones are downloaded.

    Raises:
        ConfigError: there is no such model, or its weights are of another format only.
    """
    import huggingface_hub

    patterns = [f"*{ending}" for ending in TEXTS] + ["*.safetensors"] * weights_wanted
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except Exception as error:  # huggingface_hub raises many types; all mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name}: no such folder, and not found on the model hub ({reason}); check the name "
            "and the network"
        ) from error
    if weights_wanted and not list(Path(folder).glob("*.safetensors")):
        _check_formats(name, revision, huggingface_hub)
    return Path(folder)


def _check_formats(name: str, revision: str | None, hub: Any) -> None:
    """Refuse a hub model whose weights are in another format only."""
    try:
        other = safetensors.other_format(hub.list_repo_files(name, revision=revision))
    except Exception:  # without the hub, the files that are missing are named later
        return
    if other:
        raise ConfigError(
            f"{name}: has {other} on the hub, and no model.safetensors; set model.revision to the "
            "pull request that converts it (refs/pr/N), or download the model and save it with "
            "transformers' save_pretrained"
        )
