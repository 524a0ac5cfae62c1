"""Folders of pictures, one subfolder a class, with or without captions beside them."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from cwcl_jax.data.sources.files import require
from cwcl_jax.data.sources.tables import TableSource, table_of_rows
from cwcl_jax.data.sources.tar_index import PARTS
from cwcl_jax.data.sources.texts import lines_of, text_of_bytes
from cwcl_jax.files import is_hidden

_LOG = logging.getLogger(__name__)


def open_folder(path: str, *, captions: bool = False) -> TableSource:
    """Opens a folder of pictures: `folder:/data/flowers`, one subfolder a class.

    With `captions`, the file `<name>.txt` beside each picture holds its captions, one a line.
    """
    root = require(path, "The folder of pictures")
    extensions = {"." + extension for extension in PARTS["image"]}
    rows = []
    for folder, names in _folders_below(root):
        inside = folder.relative_to(root)
        for name in sorted(names):
            file = inside / name
            if file.suffix.lower() not in extensions:
                continue
            rows.append({"image": str(file), "label": inside.parts[0] if inside.parts else None})
            if captions:
                rows[-1]["text"] = _captions_beside(folder / name)
    if not rows:
        raise FileNotFoundError(f"The folder {root} holds no pictures ({', '.join(extensions)}).")
    fields = {name: name for name in ("image", "label", "text") if any(r.get(name) for r in rows)}
    hint = "; captions=true reads the .txt files beside the pictures"
    return table_of_rows(rows, fields, root, named_classes=True, hint=hint)


def _folders_below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders in order, with their files. Links to folders are followed, each folder once.

    A link into `root` is not followed, since what it names is read where it lies; nor one to a
    folder above `root`, which would lead back here.
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
