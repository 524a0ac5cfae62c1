"""Speech data sets as released: Common Voice, SLURP, STOP, Speech Commands, spoken digits."""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.columns import StringColumn
from cwcl_jax.data.sources.files import require
from cwcl_jax.data.sources.tables import (
    TableSource,
    known_seconds,
    rows_of_json_lines,
    table_of_rows,
)

TEN_COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")


class Recordings(TableSource):
    """A table whose recordings are in the first of several folders that has them.

    If a folder has no file of that name, `renamed` (old, new) gives a second name to try.
    """

    def __init__(
        self,
        columns: Mapping[str, StringColumn],
        *,
        roots: Sequence[Path],
        class_names: Sequence[str] | None = None,
        renamed: tuple[str, str] | None = None,
        durations: np.ndarray | None = None,
    ):
        super().__init__(columns, root=roots[0], class_names=class_names, durations=durations)
        self.roots = list(roots)
        self.renamed = renamed

    def locate(self, name: str) -> Path:
        names = [name, name.replace(*self.renamed)] if self.renamed else [name]
        tried = [root / option for root in self.roots for option in dict.fromkeys(names)]
        for path in tried:
            if path.exists():
                return path
        raise BadExample("file missing", "tried " + ", ".join(map(str, tried)))


def _recordings(
    rows: Sequence[Mapping[str, Any]],
    roots: Sequence[Path],
    classes: Sequence[str] | None = None,
    renamed: tuple[str, str] | None = None,
    durations: np.ndarray | None = None,
) -> Recordings:
    """Returns recordings of rows; labels are names out of `classes`, shared by all splits."""
    table = table_of_rows(rows, {name: name for name in ("id", "audio", "text")}, roots[0])
    columns = dict(table.columns)
    if classes is not None:
        place = {name: str(number) for number, name in enumerate(classes)}
        columns["label"] = StringColumn(place[row["label"]] for row in rows)
    return Recordings(
        columns, roots=roots, class_names=classes, renamed=renamed, durations=durations
    )


def _read_tsv(file: Path, *needed: str) -> Iterator[dict[str, str]]:
    """Yields rows by header name; quotation marks are text (Common Voice has unpaired ones)."""
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        _require_names(rows.fieldnames or (), needed, f"{file}: the header")
        yield from rows


def _require_names(found: Iterable[str], needed: Iterable[str], where: str) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(
            f"{where} has no {', '.join(missing)} (it has {', '.join(found) or 'nothing'}); the "
            "release's own file is expected."
        )


def open_common_voice(path: str, *, split: str = "train") -> Recordings:
    """Opens one language's folder: `common_voice:/data/cv-corpus-13.0/en?split=train`."""
    file = require(Path(path) / f"{split}.tsv", f"Common Voice's list of the split {split!r}")
    rows = [
        {"id": row.get("path"), "audio": row.get("path"), "text": row.get("sentence")}
        for row in _read_tsv(file, "path", "sentence")
    ]
    durations = _clip_durations(Path(path) / "clip_durations.tsv", rows)
    return _recordings(rows, [Path(path) / "clips"], durations=durations)


def _clip_durations(file: Path, rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Returns seconds by row from the list in newer releases; None if it lists no clip."""
    if not file.exists():
        return None
    known = {row["clip"]: row["duration[ms]"] for row in _read_tsv(file, "clip", "duration[ms]")}
    # A clip that is not listed has an unknown length.
    return known_seconds([float(known.get(row["audio"] or "") or "nan") / 1000 for row in rows])


def open_slurp(
    path: str, *, split: str = "test", unit: str = "recordings", audio: str = ""
) -> Recordings:
    """Opens SLURP: `slurp:/data/slurp?split=devel&unit=sentences`.

    The class is scenario and action; the release's field `intent` is noisy and not used. `unit`
    selects one example per recording, or one per sentence (with its first recording).
    """
    if unit not in ("recordings", "sentences"):
        raise ValueError(f"unit={unit!r} of slurp must be recordings or sentences.")
    folder = _first_existing(Path(path), ("dataset/slurp", "slurp", "."), f"{split}.jsonl")
    rows = []
    for sentence in _slurp_lines(folder / f"{split}.jsonl"):
        base = {
            "id": str(sentence["slurp_id"]),
            "text": sentence["sentence"],
            "label": slurp_class(sentence),
        }
        recordings = sentence.get("recordings", ())
        # The release's metadata map file names to recordings; its lists hold objects with "file".
        by_name = isinstance(recordings, Mapping)
        files = [*recordings] if by_name else [recording["file"] for recording in recordings]
        wanted: list[str | None] = [*files] if unit == "recordings" else [next(iter(files), None)]
        rows += [{**base, "audio": file} for file in wanted]
    roots = [Path(audio)] if audio else _slurp_audio_folders(Path(path), folder)
    return _recordings(rows, roots, _slurp_classes(folder))


def slurp_class(sentence: Mapping[str, Any]) -> str:
    """Returns the intent of a SLURP sentence."""
    return f"{sentence['scenario']}_{sentence['action']}"


def _slurp_classes(folder: Path) -> list[str]:
    """Returns the classes of all available splits, so that labels mean the same in each."""
    files = [folder / f"{split}.jsonl" for split in ("train", "devel", "test")]
    present = [file for file in files if file.exists()]
    return sorted({slurp_class(row) for file in present for row in _slurp_lines(file)})


def _slurp_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the sentences of a list; broken lines are logged and left out."""
    for row in rows_of_json_lines(file):
        if row:
            needed = ("slurp_id", "sentence", "scenario", "action")
            _require_names(row, needed, f"{file}: a sentence")
            yield row


def _slurp_audio_folders(path: Path, folder: Path) -> list[Path]:
    places = [base / sub for base in (path, folder) for sub in ("audio", ".", "scripts/audio")]
    names = ("slurp_real", "slurp_synth")
    found = [place / name for place in places for name in names if (place / name).is_dir()]
    return list(dict.fromkeys(found)) or [path / "audio" / "slurp_real"]


def _first_existing(base: Path, folders: Sequence[str], name: str) -> Path:
    for folder in folders:
        if (base / folder / name).exists():
            return base / folder
    places = ", ".join(str(base / folder / name) for folder in folders)
    raise FileNotFoundError(f"None of these exists: {places}. Check the path and split=.")


def open_stop(path: str, *, split: str = "test") -> Recordings:
    """Opens STOP: `stop:/data/stop?split=eval` (its name for validation).

    The class is the outermost intent of the decoupled parse.
    """
    base = Path(path)
    folder = _first_existing(base, ("manifests", "stop/manifests"), f"{split}.tsv")
    rows = []
    for row in _read_tsv(folder / f"{split}.tsv", "file_id"):
        # Numbers repeat across domains, so the whole path is the id.
        file = row["file_id"]
        rows.append(
            {
                "id": file,
                "audio": file,
                "text": row.get("normalized_utterance") or row.get("utterance"),
                "label": _stop_intent(row),
            }
        )
    # Some releases name the folder `<domain>_<split>_0` as `<domain>_<split>`.
    renamed = (f"_{split}_0", f"_{split}")
    return _recordings(rows, [folder.parent], _stop_classes(folder), renamed)


def _stop_intent(row: Mapping[str, str]) -> str:
    parse = row.get("decoupled_normalized_seqlogical") or row.get("normalized_seqlogical") or ""
    return parse.split(maxsplit=1)[0].removeprefix("[IN:").lower() if parse.strip() else ""


def _stop_classes(folder: Path) -> list[str]:
    files = [folder / f"{split}.tsv" for split in ("train", "eval", "test")]
    present = [file for file in files if file.exists()]
    return sorted({_stop_intent(row) for file in present for row in _read_tsv(file)})


def open_speech_commands(path: str, *, split: str = "test", classes: int = 35) -> Recordings:
    """Opens Speech Commands V2: `speech_commands:/data/sc2?split=test&classes=10`.

    35 = all words; 10 = only the commands, without silence and unknown. The text is the word.
    """
    if classes not in (10, 35):
        raise ValueError(f"classes={classes} of speech_commands must be 35 or 10.")
    root = require(path, "Speech Commands")
    lists = {
        "validation": _names_in(root / "validation_list.txt"),
        "test": _names_in(root / "testing_list.txt"),
    }
    words = [d.name for d in sorted(root.iterdir()) if d.is_dir() and d.name[0] not in "._"]
    if classes == 10:
        words = [word for word in TEN_COMMANDS if word in words]
    rows = []
    for word in words:
        for name in sorted(os.listdir(root / word)):
            file = f"{word}/{name}"
            where = next((key for key, names in lists.items() if file in names), "train")
            if name.endswith(".wav") and name[0] != "." and where == split:
                rows.append({"id": file, "audio": file, "text": word, "label": word})
    if not rows:
        raise ValueError(f"{root} has no recordings of split={split!r} (train, validation, test).")
    return _recordings(rows, [root], words)


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def open_spoken_digits(path: str) -> Recordings:
    """Opens the Free Spoken Digit Dataset: `fsdd:/data/fsdd`, `{digit}_{speaker}_{n}.wav`."""
    root = require(path, "The Free Spoken Digit Dataset")
    root = root / "recordings" if (root / "recordings").is_dir() else root
    names = sorted(file.name for file in root.glob("[0-9]_*_*.wav"))
    words = [_DIGITS[int(name[0])] for name in names]
    rows = [
        {"id": name, "audio": name, "text": word, "label": word}
        for name, word in zip(names, words, strict=True)
    ]
    return _recordings(rows, [root], _DIGITS)


def _names_in(file: Path) -> frozenset[str]:
    return frozenset(require(file, "A list of Speech Commands").read_text().split())
