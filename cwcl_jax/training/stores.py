"""Checkpoints on object stores: extends orbax's support of `gs://` to `s3://`.

orbax 0.12 gives tensorstore drivers only for `gs://` and for files, and treats other URLs as
relative paths. tensorstore has a driver for S3, and orbax's paths (`etils.epath`) know it. A
checkpoint on a store is complete once its last object, `commit_success.txt`, is written. Retries
are those of tensorstore and of `cwcl_jax.paths`.
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

# Patched parts of orbax: the test whether a path is on a store, and tensorstore's settings.
_CHANGED = (
    (gcs_utils, "_GCS_PATH_PREFIX"),
    (gcs_utils, "get_kvstore_for_gcs"),
    (tensorstore_utils, "_use_gcs_driver"),
    (tensorstore_utils, "_normalize_path"),
)
_of_google = gcs_utils.get_kvstore_for_gcs


def prepare(directory: Path) -> None:
    """Makes orbax able to write to `directory`; does nothing for a local one.

    Raises:
      ConfigError: it is on a store of another kind, or this version of orbax is not known.
    """
    if not isinstance(directory, StorePath):
        return
    if directory.scheme not in CHECKPOINT_SCHEMES:
        raise ConfigError(
            f"{directory}: checkpoints can be written only to {' and '.join(CHECKPOINT_SCHEMES)}; "
            "give one of these or a local folder, or mount the store"
        )
    client(directory.scheme)  # before epath creates one with other settings
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
    """Returns tensorstore's specification of a path on a store."""
    if not path.startswith("s3://"):
        return _of_google(path)
    bucket, key = gcs_utils.parse_gcs_path(path, add_trailing_slash=False)
    return {"driver": "s3", "bucket": bucket, "path": key, **_s3_settings()}


def _s3_settings() -> dict[str, Any]:
    """Returns credentials, and server and region from botocore if the store is not Amazon's."""
    store = client("s3")
    store.connect()
    # Each object of a checkpoint has one writer, and the workdir one user. A conditional write
    # whose answer was lost would fail when it is retried, because its first attempt wrote the
    # object.
    settings: dict[str, Any] = {"use_conditional_write": False}
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        settings["aws_credentials"] = {"type": "environment"}
    endpoint = store.s3.meta.endpoint_url
    if not (urlparse(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        settings |= {"endpoint": endpoint, "aws_region": store.s3.meta.region_name or "us-east-1"}
    return settings
