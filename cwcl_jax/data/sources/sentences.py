"""Sentences from a user's file, prepared for synthesis: `sentences:/x/sentences.tsv?words=2000`.

Long sentences and repetitions are left out, some sentences are held out, and frequent single words
are added, so that a model also learns isolated words. A plain text file has one sentence per line;
tables are read as by `tsv:` and `csv:`.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from cwcl_jax.data.order import permute
from cwcl_jax.data.sources.base import Example, Source, fingerprint_of
from cwcl_jax.data.sources.columns import StringColumn
from cwcl_jax.data.sources.files import require
from cwcl_jax.data.sources.tables import open_delimited

_FILES = ("sentences.tsv", "sentences.csv", "sentences.txt")
_SPLITS = ("train", "test")
# Letters of any alphabet, so that "café" does not become "caf".
_WORD = re.compile(r"(?:[^\W\d_]|['\u2019]){2,}")


class Sentences(Source):
    """A fixed list of sentences, without labels."""

    def __init__(self, sentences: Sequence[str], name: str):
        self.sentences = StringColumn(sentences)
        self.name = name

    def __len__(self) -> int:
        return len(self.sentences)

    def read(self, index: int, fields: Collection[str]) -> Example:
        example: Example = {"id": f"{self.name}-{index:06d}"}
        if "text" in fields:
            example["text"] = self.sentences[index]
        return example

    def fingerprint(self) -> str:
        return fingerprint_of("sentences", self.name, self.sentences.digest_parts())


def open_sentences(
    path: str,
    *,
    split: str = "train",
    text: str = "",
    max_chars: int = 70,
    min_words: int = 2,
    words: int = 0,
    without_words: str = "",
    held_out: int = 0,
) -> Sentences:
    """Opens `sentences:FILE_OR_FOLDER?split=train&held_out=1000&words=2000`.

    Args:
      split: "test" selects the `held_out` sentences, "train" the others.
      text: the column of a table that holds the sentences; "" finds the usual names.
      max_chars: longer sentences are left out.
      min_words: shorter ones are left out too.
      words: number of the most frequent single words that are added to the training split.
      without_words: words, separated by commas, that are not added, because a test uses them.
      held_out: number of sentences, chosen by a fixed draw, that the training split leaves out.
    """
    if split not in _SPLITS:
        raise ValueError(f"split={split!r} of sentences must be train or test.")
    file = _file(path)
    usable = [
        sentence
        for sentence in dict.fromkeys(_read(file, text))
        if len(sentence) <= max_chars and len(sentence.split()) >= min_words
    ]
    if not 0 <= held_out < max(len(usable), 1):
        raise ValueError(
            f"held_out={held_out} of {file} must be below its {len(usable)} sentences."
        )
    order = permute(np.arange(len(usable)), max(len(usable), 1), 53)
    kept = np.sort(order[held_out:] if split == "train" else order[:held_out])
    chosen = [usable[i] for i in kept]
    if split == "train" and words:
        chosen += frequent_words(chosen, words, without_words.split(","))
    return Sentences(chosen, f"{file.stem}-{split}")


def frequent_words(sentences: Sequence[str], count: int, without: Collection[str]) -> list[str]:
    """Returns the most frequent words of at least two letters; ties are sorted alphabetically."""
    found = Counter(word for sentence in sentences for word in _WORD.findall(sentence.lower()))
    for word in without:
        found.pop(word, None)
    return sorted(found, key=lambda word: (-found[word], word))[:count]


def _file(path: str) -> Path:
    file = require(path, "The file of sentences")
    if not file.is_dir():
        return file
    for name in _FILES:
        if (file / name).exists():
            return file / name
    raise FileNotFoundError(f"{file} holds none of {', '.join(_FILES)}; name the file itself.")


def _read(file: Path, column: str) -> list[str]:
    if file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        return [" ".join(line.split()) for line in lines if line.strip()]
    table = open_delimited(str(file), text=column)
    if "text" not in table.columns:
        raise ValueError(f"{file} has no known column of sentences; name it with text=.")
    values = table.columns["text"]
    found = (" ".join((values[row] or "").split()) for row in range(len(values)))
    return [sentence for sentence in found if sentence]
