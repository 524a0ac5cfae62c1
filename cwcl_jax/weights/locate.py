"""Locates weights: a file or folder, an asset of this package, an installed package, or the hub."""

import hashlib
import re
from pathlib import Path

from cwcl_jax.copies import local_copy
from cwcl_jax.data.installed import inside_package
from cwcl_jax.files import write_text
from cwcl_jax.paths import is_url, to_path
from cwcl_jax.weights.readers import READERS, files_of

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Includes the dense layers of sentence-transformers, which are small.
_HUB_SETTINGS = ["*.json", "*.txt", "*.model", "*_Dense/*"]
# The first kind that a repository has; a folder's files are preferred in the same order.
_HUB_WEIGHTS = (
    "model*.safetensors",
    "flax_model*.msgpack",
    "pytorch_model*.bin",
    "*.safetensors",
    "open_clip_pytorch_model.bin",
    "*.npz",
)


def locate(weights: str) -> Path:
    """Returns the path of the `weights` of a tower.

    `package:NAME` is a file of this package's assets. `installed:PACKAGE/PATH` is a file or folder
    inside another installed package (found, never imported). `owner/name` or `owner/name@revision`
    is a repository of the Hugging Face hub (old ones have no owner). Everything else is a path; one
    on an object store (`s3://...`) is copied to this machine once.

    Raises:
      FileNotFoundError: there is no such file, folder or repository.
    """
    if is_url(weights):
        return _from_store(weights)
    if weights.startswith("package:"):
        return _existing(Path(__file__).parents[1] / "assets" / weights.removeprefix("package:"))
    if weights.startswith("installed:"):
        return _installed(weights.removeprefix("installed:"))
    path = Path(weights).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(weights) and path.suffix not in READERS:
        return _from_hub(weights)
    raise FileNotFoundError(
        f"weights {weights!r}: no such file or folder; set the tower's weights to an existing "
        "path, 'package:NAME', or a hub id 'owner/name'"
    )


def _from_store(weights: str) -> Path:
    try:
        return local_copy(to_path(weights))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"weights {weights!r}: the store has no such object") from error


def _existing(path: Path) -> Path:
    if not path.exists():
        known = sorted(p.name for p in path.parent.glob("*")) if path.parent.exists() else []
        raise FileNotFoundError(
            f"this package has no file {path.name!r} among its assets: {', '.join(known) or 'none'}"
        )
    return path


def _installed(spec: str) -> Path:
    try:
        return inside_package(spec)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"weights 'installed:{spec}': {error}") from error


def _from_hub(weights: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = weights.partition("@")
    folder = Path()
    try:
        for kind in _HUB_WEIGHTS:
            patterns = [*_HUB_SETTINGS, kind]
            folder = Path(
                snapshot_download(name, revision=revision or None, allow_patterns=patterns)
            )
            if _has_weights(folder):
                break
    except Exception as error:
        raise FileNotFoundError(
            f"weights {weights!r}: no such path, and the Hugging Face hub cannot give it "
            f"({type(error).__name__}): download the repository where there is a network, and set "
            "the tower's weights to its folder"
        ) from error
    return folder


def _has_weights(folder: Path) -> bool:
    try:
        return bool(files_of(folder))
    except FileNotFoundError:
        return False


def sha256_of(*paths: Path) -> str:
    """Returns one hash for the weights at `paths`: of the file, or of the hashes of all files.

    Raises:
      ValueError: a file does not have the hash that was stored with it.
    """
    digests = []
    for file in (file for path in paths for file in files_of(path)):
        digests.append(_digest(file))
        promised, where = _promised_sha256(file)
        if promised and promised != digests[-1]:
            raise ValueError(
                f"{file} is damaged or was changed: its sha256 is {digests[-1][:16]}..., {where} "
                f"says {promised[:16]}...; fetch it again"
            )
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def write_sha256(file: Path) -> None:
    """Writes the hash of a file into NAME.sha256 next to it, as sha256sum does."""
    write_text(file.with_name(f"{file.name}.sha256"), f"{_digest(file)}  {file.name}\n")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _promised_sha256(file: Path) -> tuple[str, str]:
    """Returns the hash that was stored with a file, and its location; empty without one.

    The hub's cache names a large file by its hash and links to it. A folder that the hub's tools
    filled has the hash in the second line of a metadata file. Others store NAME.sha256 next to
    NAME.
    """
    if file.is_symlink() and _SHA256.fullmatch(file.readlink().name):
        return file.readlink().name, "the name in the hub's cache"
    notes = file.parent / ".cache/huggingface/download" / f"{file.name}.metadata"
    for place, line in ((notes, 1), (file.with_name(f"{file.name}.sha256"), 0)):
        if place.is_file():
            lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
            words = lines[line].split() if len(lines) > line else []
            if words and _SHA256.fullmatch(words[0].lower()):
                return words[0].lower(), str(place)
    return "", ""
