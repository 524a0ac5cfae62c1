"""The embedded commands as a source of text: `commands:train`, `commands:test?task=intent&n=1000`.

Tasks of the splits devel and test: `intent` (intents whose other sentences are in the training
split), `new_intent` (intents that are not), `keywords` (single words that are not), `retrieval`
(distinct sentences of all intents). `spoken:` synthesises them as speech.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.sources.base import Example, Source, fingerprint_of
from cwcl_jax.synthetic import commands

# Part of the fingerprint: increase it when the grammar changes.
_VERSION = 1
_DEFAULT_LENGTH = {"train": 12_000}


@dataclass(frozen=True)
class Commands(Source):
    """Sentences of a split; labelled if `task` is a classification task."""

    split: str
    task: str
    length: int
    seed: int = 0
    # Sentence numbers, if they are not simply 0, 1, 2, ...
    numbers: Sequence[int] = field(default=(), repr=False)

    @property
    def class_names(self) -> Sequence[str] | None:
        """Class names in label order, for the classification tasks."""
        known = [name for name in commands.INTENTS if name not in commands.NEW_INTENTS]
        names = {"intent": known, "new_intent": commands.NEW_INTENTS, "keywords": commands.KEYWORDS}
        return names.get(self.task)

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, fields: Collection[str]) -> Example:
        number = self.numbers[index] if self.numbers else index
        example: Example = {"id": f"{self.split}-{self.task}-{self.seed}-{number:06d}"}
        if "text" in fields:
            example["text"] = self.text(number)
        if self.class_names is not None:
            example["label"] = number % len(self.class_names)
        return example

    def text(self, number: int) -> str:
        """Returns the sentence of a number."""
        key = (self.seed, commands.SPLITS.index(self.split), number)
        if self.split == "train":
            return commands.training_sentence(*key)
        if self.task == "keywords":
            return commands.KEYWORDS[number % len(commands.KEYWORDS)]
        names = self.class_names or list(commands.INTENTS)
        # Classes are balanced; sentences for retrieval draw them.
        label = number if self.class_names else Draws(52, *key).below(len(names))
        return commands.sentence(names[label % len(names)], self.split, *key)

    def fingerprint(self) -> str:
        shared = (self.split, self.task, self.length, self.seed)
        return fingerprint_of("commands", _VERSION, *shared)


def open_commands(split: str, *, task: str = "", n: int = 0, seed: int = 0) -> Commands:
    """Opens `commands:train?n=12000` or `commands:test?task=intent|new_intent|...`."""
    if split not in commands.SPLITS:
        raise ValueError(f"commands: has the splits train, devel and test, not {split!r}.")
    if split == "train" and task:
        raise ValueError(f"commands:train has no tasks (got task={task!r}); use devel or test.")
    if split != "train" and task not in commands.TASKS:
        raise ValueError(
            f"commands:{split} needs task=, one of {', '.join(commands.TASKS)}; got {task!r}."
        )
    if n < 0:
        raise ValueError(f"commands: n={n} must not be negative.")
    source = Commands(split, task, n or _DEFAULT_LENGTH.get(split, 1000), seed)
    return _with_distinct_sentences(source) if task == "retrieval" else source


def _with_distinct_sentences(source: Commands) -> Commands:
    """Returns the source without repeated sentences: retrieval must have one right answer."""
    seen: set[str] = set()
    numbers: list[int] = []
    number = 0
    while len(numbers) < source.length:
        made = source.text(number)
        if made not in seen:
            seen.add(made)
            numbers.append(number)
        number += 1
        if number > 100 * source.length:
            raise ValueError(f"commands:{source.split} has no {source.length} distinct sentences.")
    return Commands(source.split, source.task, source.length, source.seed, tuple(numbers))
