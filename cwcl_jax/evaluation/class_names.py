"""The classes of a task: their names in prompts, and which of them are candidates.

Names come from the source, from a list, or from a user's file. Subsets and mappings (ImageNet-A and
-R have 200 of ImageNet's classes, ObjectNet 113 that overlap) are files too.
"""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from cwcl_jax.evaluation.files import read_json, read_text, user_file

if TYPE_CHECKING:
    from cwcl_jax.evaluation.tasks.labelled import Labelled


# Names that mean nothing to a text tower, even if words follow them.
_NO_WORDS = {
    "are numbers": re.compile(r"[-+]?\d+([.,]\d+)?"),
    "hold WordNet ids": re.compile(r"n\d{8}\b.*"),
}


@dataclass(frozen=True)
class Classes:
    """The candidate classes, and the candidate of each label of the source.

    `names[c]` are the names of candidate c (synonyms share one class embedding). `candidate_of[l]`
    is the candidate of the source's label l, or -1 if items with that label are excluded.
    """

    names: tuple[tuple[str, ...], ...]
    candidate_of: Int[np.ndarray, "l"]
    source_names: tuple[str, ...]  # names of the candidates in the source
    warnings: tuple[str, ...] = ()

    @property
    def titles(self) -> list[str]:
        """One name per candidate, for tables."""
        return [names[0] for names in self.names]

    def of_labels(self, labels: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """Returns the candidates of the source's labels, -1 for classes that are not candidates."""
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.candidate_of):
            raise ValueError(
                f"the labels run from {labels.min()} to {labels.max()}, but the class list has "
                f"{len(self.candidate_of)} names: they do not belong together."
            )
        return self.candidate_of[labels]


def resolve_classes(source_names: Sequence[str] | None, task: "Labelled") -> Classes:
    """Returns the classes that a task selects and renames, given the source's names."""
    prompt_names = _prompt_names(source_names, task)
    subset = _read_subset(task.class_subset) if task.class_subset else None
    names: list[tuple[str, ...]] = []
    own_names: list[str] = []
    candidate_of = np.full(len(prompt_names), -1, np.int64)
    used: set[str] = set()
    for label, group in enumerate(prompt_names):
        if group is None:
            continue
        own_name = source_names[label] if source_names is not None else group[0]
        aliases = {str(label), own_name, *group}
        if subset is not None and not aliases & subset:
            continue
        used |= aliases
        candidate_of[label] = len(names)
        names.append(group)
        own_names.append(own_name)
    if subset is not None and subset - used:
        raise ValueError(
            f"class_subset={task.class_subset!r} lists {sorted(subset - used)[:5]}, which are "
            "neither class names nor indices of this source; correct the file."
        )
    if not names:
        raise ValueError(f"no class is left for source {task.source!r}; check class_names.")
    warnings = _name_warnings(names) + _position_warning(names, own_names, source_names, task)
    return Classes(tuple(names), candidate_of, tuple(own_names), warnings)


def _prompt_names(
    source_names: Sequence[str] | None, task: "Labelled"
) -> list[tuple[str, ...] | None]:
    """Returns the names of every source label, or None for classes that the mapping leaves out."""
    if not task.class_names:
        if not source_names:
            raise ValueError(
                f"source {task.source!r} has no class names; set class_names to a file with one "
                "name per line, in the order of the labels."
            )
        return [_checked((name,), label) for label, name in enumerate(source_names)]
    given = read_class_names(task.class_names)
    if isinstance(given, Mapping):
        return _mapped(source_names, given, task)
    if source_names is not None and len(given) != len(source_names):
        raise ValueError(
            f"class_names={task.class_names!r} has {len(given)} names, but the source has "
            f"{len(source_names)} classes; give one name per class, in the order of the labels."
        )
    if source_names is not None:
        given = _in_order_of(source_names, given, task)
    return [_checked((name,), label) for label, name in enumerate(given)]


def _in_order_of(
    source_names: Sequence[str], given: Sequence[str], task: "Labelled"
) -> Sequence[str]:
    """Returns the user's names in the order of the source's classes.

    They are matched by name if both lists hold the same names.
    """
    theirs, ours = ([_plain(name) for name in names] for names in (source_names, given))
    if len(set(theirs)) == len(theirs) and set(theirs) == set(ours):
        return [given[ours.index(name)] for name in theirs]
    place = {name: label for label, name in enumerate(theirs)}
    moved = [name for label, name in enumerate(ours) if place.get(name, label) != label]
    if moved:
        raise ValueError(
            f"class_names={task.class_names!r} has {moved[0]!r} at another index than the source "
            "and also other names, so the order is in doubt: give a mapping, a .tsv file with the "
            f"source's name and yours on each line (the source's: {', '.join(source_names[:5])}, "
            "...)."
        )
    return given


def _plain(name: str) -> str:
    """Returns a name normalised for comparison between two lists."""
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def _mapped(
    source_names: Sequence[str] | None, given: Mapping[str, tuple[str, ...]], task: "Labelled"
) -> list[tuple[str, ...] | None]:
    if source_names is None:
        raise ValueError(
            f"class_names={task.class_names!r} maps names, but source {task.source!r} has none of "
            "its own; give a plain list, one name per line."
        )
    missing = [name for name in source_names if name not in given]
    if missing and task.unmapped_classes == "error":
        raise ValueError(
            f"class_names={task.class_names!r} does not list {len(missing)} of the source's "
            f"{len(source_names)} classes, e.g. {missing[:3]}; add them, or set "
            "unmapped_classes='drop' to leave their items out."
        )
    return [
        _checked(given[name], label) if name in given else None
        for label, name in enumerate(source_names)
    ]


def read_class_names(spec: str) -> list[str] | dict[str, tuple[str, ...]]:
    """Returns a list (one name a line, or comma-separated) or a mapping (two-column .tsv, .json).

    A mapping goes from the source's name of a class (such as the folder `n01440764`) to the name or
    names that are used in prompts.
    """
    path = user_file(spec)
    if not path.is_file():
        if "," in spec:
            return [name.strip() for name in spec.split(",")]
        raise FileNotFoundError(
            f"class_names={spec!r} is not a file; give a path, or the names separated by commas."
        )
    if path.suffix == ".json":
        return _names_from_json(path)
    lines = read_text(path).splitlines()
    if path.suffix == ".tsv":
        rows = [row for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
        broken = [row for row in rows if len(row) != 2]
        if broken:
            raise ValueError(
                f"{path}: expected two columns (source name, prompt name): {broken[0]}"
            )
        return {source: (name.strip(),) for source, name in rows}
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.strip() for line in lines]


def _names_from_json(path: Path) -> list[str] | dict[str, tuple[str, ...]]:
    content = read_json(path)
    if _are_names(content):
        return content
    if isinstance(content, dict):
        groups = {k: [v] if isinstance(v, str) else v for k, v in content.items()}
        if all(map(_are_names, groups.values())):
            return {k: tuple(v) for k, v in groups.items()}
    raise ValueError(f"{path}: expected a JSON list of names or an object name -> name(s).")


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _read_subset(spec: str) -> set[str]:
    path = user_file(spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"class_subset={spec!r} is not a file; give one class name or index per line."
        )
    return {line.strip() for line in read_text(path).splitlines() if line.strip()}


def _checked(names: tuple[str, ...], label: int) -> tuple[str, ...]:
    if not names or any(not name.strip() for name in names):
        raise ValueError(f"class {label} has an empty name; every class needs words for prompts.")
    return names


def _name_warnings(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    counts = Counter(name for group in names for name in set(group))
    warnings = []
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        shown = ", ".join(repr(name) for name in twice[:5])
        warnings.append(
            f"{len(twice)} class name(s) stand for more than one class ({shown}): their embeddings "
            "are equal, and the class with the lower index wins the tie."
        )
    for kind, pattern in _NO_WORDS.items():
        found = [name for name in counts if pattern.fullmatch(name.strip())]
        if found:
            warnings.append(
                f"{len(found)} class name(s) {kind}, such as {found[0]!r}, which mean nothing in a "
                "prompt: set class_names to a .tsv file with the source's name and the words for "
                "it on each line."
            )
    return tuple(warnings)


def _position_warning(
    names: Sequence[tuple[str, ...]],
    own_names: Sequence[str],
    source_names: Sequence[str] | None,
    task: "Labelled",
) -> tuple[str, ...]:
    """Returns a warning if the user's names were matched to the source's names by position."""
    if not task.class_names or source_names is None or Path(task.class_names).suffix == ".tsv":
        return ()
    pairs = [(own, group[0]) for own, group in zip(own_names, names, strict=True)]
    renamed = [f"{own} = {name}" for own, name in pairs if _plain(own) != _plain(name)]
    if not renamed or Path(task.class_names).suffix == ".json":
        return ()
    return (
        f"class_names were matched by index, since {len(renamed)} names differ from the source's: "
        f"{', '.join(renamed[:5])}; a .tsv file that maps names removes the doubt.",
    )
