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

STORES = {"gs": "gcsfs", "s3": "s3fs"}  # what reads a URL of an object store
COMMIT = ocp.path.atomicity.COMMIT_SUCCESS_FILE  # there, nothing can be renamed at once


def locate(folder: str | Path) -> epath.Path:
    if not in_store(folder):
        return epath.Path(Path(folder).absolute())
    _prepare(str(folder))
    return epath.Path(folder)


def in_store(folder: Any) -> bool:
    """Whether it lies in an object store."""
    return "://" in str(folder)


def inside(folder: epath.Path) -> list[epath.Path]:
    """What lies in a folder, and not what fsspec remembers: TensorStore writes beside it."""
    if in_store(folder):
        fsspec_backend.fs(folder).invalidate_cache()
    return list(folder.iterdir()) if folder.exists() else []


def is_finished(path: epath.Path) -> bool:
    return path.name.isdigit() and (not in_store(path) or (path / COMMIT).exists())


def finished_steps(folder: epath.Path) -> list[int]:
    """All finished steps, as they lie there: Orbax's own list is wrong after a failed save."""
    return sorted(int(path.name) for path in inside(folder) if is_finished(path))


def _prepare(url: str) -> None:
    """Let a URL of an object store be read.

    Raises:
        ConfigError: of a kind that cannot be, or a package is missing.
    """
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        raise ConfigError(f"{url}: cannot be read; use a folder, gs://bucket/path or s3://...")
    if importlib.util.find_spec(STORES[scheme]) is None:
        raise ConfigError(f"{url}: {STORES[scheme]} is not installed; pip install '.[{scheme}]'")
    os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is, too
    if scheme == "s3":
        _teach_s3()


@functools.cache
def _teach_s3() -> None:
    """Let Orbax hand arrays in S3 to TensorStore, which can store them there: Orbax 0.12 itself
    names its drivers for folders and gs:// only (google/orbax#2739). An endpoint that is not
    Amazon's is named by AWS_ENDPOINT_URL, as everywhere.

    Raises:
        StorageError: this Orbax is another one.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    try:
        normalize = tensorstore_utils._normalize_path
        is_store = tensorstore_utils._use_gcs_driver
        spec = gcs_utils.get_kvstore_for_gcs
    except AttributeError as error:
        raise StorageError(
            f"s3://: orbax-checkpoint {ocp.__version__} is not known to store arrays there; "
            "install 0.12.8, or use a folder or gs://"
        ) from error

    def s3_spec(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return spec(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        found = {"driver": "s3", "bucket": bucket, "path": key}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            found |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        return found

    tensorstore_utils._normalize_path = lambda path: re.sub("^s3:/+", "s3://", normalize(path))
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith("s3://") or is_store(path)
    gcs_utils.get_kvstore_for_gcs = s3_spec
