"""Classifies one recording, picture or other item by class names that the user types."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.evaluation import prompts
from cwcl_jax.evaluation.encoding import Clock, Encode, encode_sentences
from cwcl_jax.evaluation.tables import Table
from cwcl_jax.evaluation.zero_shot import class_embeds, normalise


@dataclass(frozen=True)
class Ranked:
    """Class names with their cosine similarities, the best first."""

    names: tuple[str, ...]
    similarities: tuple[float, ...]
    warnings: tuple[str, ...] = ()

    def table(self, title: str) -> Table:
        """Returns a table of rank, similarity and class."""
        rows = [
            (str(rank), f"{similarity:.4f}", name)
            for rank, (name, similarity) in enumerate(
                zip(self.names, self.similarities, strict=True), 1
            )
        ]
        notes = tuple(f"Warning: {warning}" for warning in self.warnings)
        return Table(title, ("rank", "similarity", "class"), tuple(rows), notes)


def rank_classes(
    path: Path,
    tower: str,
    class_names: Sequence[str],
    *,
    encode: Encode,
    data: DataConfig,
    templates: str = "name",
) -> Ranked:
    """Returns `class_names` ranked for the item in `path`, which `tower` reads.

    Raises:
      ValueError: no classes, or an unreadable or empty file.
      FileNotFoundError: there is no such file.
    """
    names = list(dict.fromkeys(name.strip() for name in class_names if name.strip()))
    if not names:
        raise ValueError("no class names; give some, separated by commas.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    reader = data.inputs_of(tower)
    try:
        inputs = reader.batch([path])
    except BadExample as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    warnings = [
        f"the item is {remark}." for remark, rows in reader.remarks(inputs).items() if rows.any()
    ]
    warnings += [f"the item is {remark}." for remark in reader.lost(reader.opened(path))]
    if len(names) < len(class_names):
        warnings.append("empty or repeated class names were left out.")
    embed = normalise(np.asarray(encode(tower, inputs), np.float32))[:1]
    # The same wording as in tasks, so that a class gets the same score in both.
    chosen = prompts.load_templates(templates)
    filled = [prompts.fill(chosen, [prompts.readable(name)]) for name in names]
    embeds = encode_sentences(
        [sentence for group in filled for sentence in group],
        encode=encode,
        data=data,
        batch_size=64,
        clock=Clock(),
    )
    similar = (embed @ class_embeds(embeds, [len(group) for group in filled]).T)[0]
    order = np.argsort(-similar, kind="stable")
    return Ranked(
        tuple(names[i] for i in order),
        tuple(float(similar[i]) for i in order),
        tuple(warnings),
    )
