"""Uploads of verified releases to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from easyaira.errors import CheckFailed, ConfigError, StorageError
from easyaira.export import checks
from easyaira.files import reason


def check(repo: str) -> None:
    """Check that a release can be uploaded: a token is there, and the hub answers.

    Raises:
        ConfigError: it cannot.
    """
    import huggingface_hub

    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    if not huggingface_hub.get_token():
        raise ConfigError(f"{repo}: no token of the hub; run hf auth login, or set HF_TOKEN")
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # huggingface_hub raises many types; all mean the same here
        raise ConfigError(
            f"{repo}: the hub does not accept the token or does not answer ({reason(error)}); "
            "check HF_TOKEN and the network"
        ) from error


def push(folder: Path, repo: str, private: bool | None = None) -> str:
    """Verify a release against its proof, then upload it.

    Args:
        repo: owner/name; created if it is not there.
        private: whether a new repository is private; None: the owner's default.

    Returns:
        the address of the repository.

    Raises:
        CheckFailed: the folder is not what was released.
        StorageError: the upload failed.
    """
    import huggingface_hub

    wrong = [result.check for result in checks.verify(folder) if result.ok is False]
    if wrong:
        raise CheckFailed(f"{folder}: not what was released: {', '.join(wrong)}; nothing was sent")
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by EasyAira")
    except Exception as error:  # huggingface_hub raises many types; all mean the same here
        raise StorageError(
            f"{folder}: not uploaded to {repo}: {reason(error)}; then run easyaira push {folder} "
            f"--repo {repo}"
        ) from error
    return str(url)
