"""Folders of pictures or recordings, one subfolder per class, with or without captions."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cwcl_jax.data.sources.files import require
from cwcl_jax.data.sources.tables import TableSource, table_of_rows
from cwcl_jax.data.sources.tar_index import PARTS
from cwcl_jax.data.sources.texts import lines_of, text_of_bytes
from cwcl_jax.files import is_hidden

_LOG = logging.getLogger(__name__)


def open_folder(path: str, *, captions: bool = False) -> TableSource:
    """Opens a folder of pictures: `folder:/data/flowers`, one subfolder per class.

    A folder without pictures is read as a folder of recordings. With `captions`, the file
    `<name>.txt` next to each of them contains its captions, one per line.
    """
    root = require(path, "The folder of pictures or recordings")
    found: dict[str, list[dict[str, Any]]] = {"image": [], "audio": []}
    others = Counter[str]()
    for folder, names in _folders_below(root):
        inside = folder.relative_to(root)
        for name in sorted(names):
            file = inside / name
            field = next((f for f in found if file.suffix[1:].lower() in PARTS[f]), None)
            if field is None:
                others[file.suffix.lower()] += 1
                continue
            row: dict[str, Any] = {field: str(file)}
            row["label"] = inside.parts[0] if inside.parts else None
            if captions:
                row["text"] = _captions_beside(folder / name)
            found[field].append(row)
    field = "image" if found["image"] else "audio"
    rows = found[field]
    if not rows:
        raise FileNotFoundError(_nothing_in(root, others))
    if field == "image" and found["audio"]:
        _LOG.warning(
            "%s is read as a folder of pictures: its %d recordings are left out.",
            root,
            len(found["audio"]),
        )
    fields = {name: name for name in (field, "label", "text") if any(r.get(name) for r in rows)}
    hint = "; captions=true reads the .txt files beside the files"
    return table_of_rows(rows, fields, root, named_classes=True, hint=hint)


def _nothing_in(root: Path, others: Counter[str]) -> str:
    """Returns the message for a folder without examples: what is expected, and what it contains."""
    wanted = ", ".join(f".{ending}" for field in ("image", "audio") for ending in PARTS[field])
    had = ", ".join(f"{n} {ending or 'without an ending'}" for ending, n in others.most_common(3))
    return (
        f"The folder {root} holds no pictures and no recordings ({wanted})"
        + (f"; it holds {had}" if had else "")
        + "."
    )


def _folders_below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields folders in order, with their files. Links to folders are followed, each folder once.

    A link into `root` is not followed, because its target is read in its own place; nor is a link
    to a folder above `root`, which would lead back here.
    """
    here, seen, repeated = root.resolve(), set[Path](), list[Path]()
    for name, subfolders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        yield folder, [file for file in files if not is_hidden(file)]
        subfolders[:] = sorted(sub for sub in subfolders if not is_hidden(sub))
        for sub in [sub for sub in subfolders if (folder / sub).is_symlink()]:
            real = (folder / sub).resolve()
            inside = real.is_relative_to(here) or here.is_relative_to(real)
            if inside or any(map(real.is_relative_to, seen)):
                subfolders.remove(sub)
                repeated.append(folder / sub)
            seen.add(real)
    if repeated:
        _LOG.warning(
            "%d links to folders that are read anyway are not followed, first %s.",
            len(repeated),
            repeated[0],
        )


def _captions_beside(image: Path) -> list[str] | None:
    beside = image.with_suffix(".txt")
    return lines_of(text_of_bytes(beside.read_bytes())) if beside.exists() else None
