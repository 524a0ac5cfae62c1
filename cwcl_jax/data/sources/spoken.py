"""Spoken sentences: another source's text read aloud by espeak-ng, in a voice the index picks.

`spoken:commands:train?voices=train`, `spoken:tsv:/sentences.tsv?text=sentence&voices=en-us+f2`.
`keep=auto` (or a folder) speaks everything once and reads it from there ever after; `python -m
cwcl_jax.data.sources.spoken LINE FOLDER` writes FLAC files and a manifest, to listen to.
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.espeak import VOICE_SETS, VOICES, random_voice, speak
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example, Source, SourceBase, fingerprint_of
from cwcl_jax.data.sources.recorded import Recorded, default_folder


class Spoken(SourceBase):
    """The examples of `source`, each with its first caption that holds any text as "audio"."""

    def __init__(self, source: Source, *, voices: Sequence[str] = VOICES, seed: int = 0):
        self.source = source
        self.voices = tuple(voices)
        self.seed = seed
        self.embedded = tuple(getattr(source, "embedded", ()))

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.source.class_names

    @property
    def lacks(self) -> Mapping[str, str]:
        lacks = dict(getattr(self.source, "lacks", {}))
        lacks.pop("audio", None)
        return lacks | ({"audio": lacks["text"]} if "text" in lacks else {})

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, fields: Collection[str]) -> Example:
        if "audio" not in fields:
            return self.source.read(index, fields)
        example = self.source.read(index, {*fields, "text"} - {"audio"})
        text = example.get("text") or ""
        captions = [text] if isinstance(text, str) else text
        text = next((caption for caption in captions if caption and caption.strip()), None)
        if text is None:
            raise BadExample("text empty", "nothing to speak")
        example["audio"] = speak(text, random_voice(Draws(self.seed, 31, index), self.voices))
        return example

    def fingerprint(self) -> str:
        return fingerprint_of("spoken", self.source.fingerprint(), self.voices, self.seed)


def open_spoken(
    source: Source, *, cache_dir: str = "", voices: str = "", voice_seed: int = 0, keep: str = ""
) -> Spoken | Recorded:
    """Reads a source aloud.

    Args:
      voices: espeak-ng's names separated by commas, or "train" or "test", sets that share neither
        an accent nor a variant.
      voice_seed: another number gives every sentence another voice.
      keep: a folder for the recordings, or "auto": one in the cache folder.
    """
    names = VOICE_SETS.get(voices) or (tuple(voices.split(",")) if voices else VOICES)
    spoken = Spoken(source, voices=names, seed=voice_seed)
    if not keep:
        return spoken
    return Recorded(spoken, default_folder(spoken, cache_dir) if keep == "auto" else keep)


def render(source: Source, folder: str | Path) -> Path:
    """Writes the recordings of a spoken source as FLAC with a manifest; continues where it was.

    Raises:
      ValueError: the source is not spoken, or the folder holds the recordings of another one.
    """
    import soundfile

    if not isinstance(source, (Spoken, Recorded)):
        raise ValueError("Only spoken sources are written: put spoken: before the source line.")
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
            soundfile.write(root / "unfinished.flac", samples, rate)
            (root / "unfinished.flac").replace(root / name)
        row = {"id": example["id"], "audio": name, "text": example.get("text")}
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
    from cwcl_jax.data.sources import open_source

    if len(sys.argv) != 3:
        sys.exit("usage: python -m cwcl_jax.data.sources.spoken SOURCE_LINE FOLDER")
    try:
        print(render(open_source(sys.argv[1]), sys.argv[2]))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
