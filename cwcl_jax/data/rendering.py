"""Spoken sentences as files: `python -m cwcl_jax.data.rendering SOURCE_LINE FOLDER`.

FLAC files and a manifest, to listen to or to bring elsewhere: `jsonl:FOLDER/manifest.jsonl` reads
the same examples.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cwcl_jax.data.audio import import_package
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.base import Source
from cwcl_jax.data.sources.recorded import Recorded
from cwcl_jax.data.sources.spoken import Spoken
from cwcl_jax.files import replacing


def render(source: Source, folder: str | Path) -> Path:
    """Writes the recordings of a spoken source as FLAC with a manifest; continues where it was.

    Raises:
      ValueError: the source is not spoken, or the folder holds the recordings of another one.
    """
    if not isinstance(source, (Spoken, Recorded)):
        raise ValueError("Only spoken sources are written: put spoken: before the source line.")
    soundfile = import_package("soundfile")
    root = Path(folder)
    (root / "audio").mkdir(parents=True, exist_ok=True)
    _claim(root, source.fingerprint())
    manifest = root / "manifest.jsonl"
    rows = []
    for index in range(len(source)):
        name = f"audio/{index:08d}.flac"
        fields = ("text", "label") if (root / name).exists() else ("text", "label", "audio")
        try:
            example = source.read(index, fields)
        except BadExample:
            continue
        if "audio" in example:
            samples, rate = example["audio"]
            with replacing(root / name) as partial:
                soundfile.write(partial, samples, rate, format="FLAC")
        row = {"id": example["id"], "audio": name, "text": example.get("text")}
        row["duration"] = soundfile.info(root / name).duration
        if "label" in example:
            row["label"] = _label(example["label"], source.class_names)
        rows.append(row)
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def _claim(root: Path, fingerprint: str) -> None:
    """Notes whose recordings a folder holds; a ValueError where they are another source's."""
    note = root / "fingerprint.txt"
    there = note.read_text(encoding="utf-8") if note.exists() else ""
    if there != fingerprint and any((root / "audio").iterdir()):
        raise ValueError(
            f"{root} holds recordings of another source, voices or seed: name another folder, or "
            "delete this one."
        )
    note.write_text(fingerprint, encoding="utf-8")


def _label(label: int, names: Sequence[str] | None) -> int | str:
    """As manifests have it: by name, where there are names."""
    return label if names is None else names[label]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m cwcl_jax.data.rendering SOURCE_LINE FOLDER")
    try:
        print(render(open_source(sys.argv[1]), sys.argv[2]))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
