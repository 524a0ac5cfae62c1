"""Checkpoints on object stores: what orbax does for `gs://`, for `s3://` too.

orbax 0.12 gives tensorstore a driver for `gs://` and for files alone, and takes the rest for
relative paths; tensorstore has one for S3, and orbax's paths (`etils.epath`) know it. A checkpoint
on a store counts once its last object, `commit_success.txt`, is written. Retries are tensorstore's
and those of `cwcl_jax.paths`.
"""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from cwcl_jax.config import ConfigError
from cwcl_jax.paths import CHECKPOINT_SCHEMES, StorePath, client

# What is changed in orbax: where it asks whether a path is on a store, and what tensorstore gets.
_CHANGED = (
    (gcs_utils, "_GCS_PATH_PREFIX"),
    (gcs_utils, "get_kvstore_for_gcs"),
    (tensorstore_utils, "_use_gcs_driver"),
    (tensorstore_utils, "_normalize_path"),
)
_of_google = gcs_utils.get_kvstore_for_gcs


def prepare(directory: Path) -> None:
    """Makes orbax write to `directory`; does nothing for a local one.

    Raises:
      ConfigError: it is on a store of another kind, or this version of orbax is not known.
    """
    if not isinstance(directory, StorePath):
        return
    if directory.scheme not in CHECKPOINT_SCHEMES:
        raise ConfigError(
            f"{directory}: checkpoints are written to {' and '.join(CHECKPOINT_SCHEMES)} alone; "
            "give one of these or a local folder, or mount the store"
        )
    client(directory.scheme)  # before epath makes one with other settings
    if directory.scheme == "s3" and gcs_utils._GCS_PATH_PREFIX != ("gs://", "s3://"):
        _teach_s3()


def _teach_s3() -> None:
    missing = [name for module, name in _CHANGED if not hasattr(module, name)]
    if missing:
        raise ConfigError(
            f"checkpoints on s3:// need another version of orbax-checkpoint ({missing[0]} is not "
            "in this one); install 0.12.8, or mount the store"
        )
    gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")  # pyright: ignore[reportAttributeAccessIssue]
    gcs_utils.get_kvstore_for_gcs = _key_value_store
    tensorstore_utils._use_gcs_driver = lambda directory: "://" in directory
    tensorstore_utils._normalize_path = _normalised


def _normalised(path: str) -> str:
    scheme, colon, rest = path.partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}" if colon else os.path.normpath(path)


def _key_value_store(path: str) -> dict[str, Any]:
    """tensorstore's description of a place on a store."""
    if not path.startswith("s3://"):
        return _of_google(path)
    bucket, key = gcs_utils.parse_gcs_path(path, add_trailing_slash=False)
    return {"driver": "s3", "bucket": bucket, "path": key, **_s3_settings()}


def _s3_settings() -> dict[str, Any]:
    """Server and region as botocore finds them, where they are not Amazon's own."""
    store = client("s3")
    store.connect()
    # Each object of a checkpoint has one writer, and the workdir one user. With conditions a write
    # whose answer was lost would fail when it is tried again: its first attempt made the object.
    settings: dict[str, Any] = {"use_conditional_write": False}
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        settings["aws_credentials"] = {"type": "environment"}
    endpoint = store.s3.meta.endpoint_url
    if not (urlparse(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        settings |= {"endpoint": endpoint, "aws_region": store.s3.meta.region_name or "us-east-1"}
    return settings
