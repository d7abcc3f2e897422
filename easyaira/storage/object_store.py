"""Object stores: folders at `gs://` and `s3://` URLs."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from etils.epath.backend import fsspec_backend

from easyaira.errors import ConfigError, StorageError

STORES = {"gs": "gcsfs", "s3": "s3fs"}  # URL scheme: package that reads it
COMMIT = ocp.path.atomicity.COMMIT_SUCCESS_FILE  # object stores have no atomic rename


def locate(folder: str | Path) -> epath.Path:
    if not in_store(folder):
        path = Path(folder).absolute()
        if odd := [sign for sign in "[\\" if sign in str(path)]:  # Orbax takes it for a pattern
            raise ConfigError(
                f"{path}: checkpoints need a path without {odd[0]}; rename the folder"
            )
        return epath.Path(path)
    _prepare(str(folder))
    return epath.Path(folder)


def in_store(folder: Any) -> bool:
    """Whether the folder is in an object store."""
    return "://" in str(folder)


def inside(folder: epath.Path) -> list[epath.Path]:
    """List a folder without fsspec's cache, which misses the files that TensorStore writes."""
    if in_store(folder):
        fsspec_backend.fs(folder).invalidate_cache()
    return list(folder.iterdir()) if folder.exists() else []


def is_finished(path: epath.Path) -> bool:
    return path.name.isdigit() and (not in_store(path) or (path / COMMIT).exists())


def finished_steps(folder: epath.Path) -> list[int]:
    """List the finished steps from the folder; Orbax's own list is wrong after a failed save."""
    return sorted(int(path.name) for path in inside(folder) if is_finished(path))


def _prepare(url: str) -> None:
    """Set up access to an object store.

    Raises:
        ConfigError: the URL's scheme is not supported, or its package is missing.
    """
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        raise ConfigError(f"{url}: unsupported URL; use a folder, gs://bucket/path or s3://...")
    if importlib.util.find_spec(STORES[scheme]) is None:
        raise ConfigError(f"{url}: {STORES[scheme]} is not installed; pip install '.[{scheme}]'")
    os.environ.setdefault("EPATH_USE_TF", "false")  # even where TensorFlow is installed
    if scheme == "s3":
        _teach_s3()


@functools.cache
def _teach_s3() -> None:
    """Register TensorStore's own S3 driver with Orbax.

    Orbax 0.12 selects a driver only for folders and gs:// (google/orbax#2739). AWS_ENDPOINT_URL
    names an endpoint other than Amazon's, as usual.

    Raises:
        StorageError: this version of Orbax lacks the functions that are patched.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    try:
        normalize = tensorstore_utils._normalize_path
        is_store = tensorstore_utils._use_gcs_driver
        spec = gcs_utils.get_kvstore_for_gcs
    except AttributeError as error:
        raise StorageError(
            f"s3://: orbax-checkpoint {ocp.__version__} is not supported for arrays in S3; "
            "install 0.12.8, or use a folder or gs://"
        ) from error

    def s3_spec(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return spec(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        driver = {"driver": "s3", "bucket": bucket, "path": key}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            driver |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        return driver

    tensorstore_utils._normalize_path = lambda path: re.sub("^s3:/+", "s3://", normalize(path))
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith("s3://") or is_store(path)
    gcs_utils.get_kvstore_for_gcs = s3_spec
