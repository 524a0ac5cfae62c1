"""The prompts of a classification task: named lists, a user's file, or a data set's sentences."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation import prompts
from cwcl_jax.evaluation.class_names import Classes
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.zero_shot import class_embeds

if TYPE_CHECKING:
    from cwcl_jax.evaluation.tasks.classification import Classification


# The value of `templates` for those that come with a source's data.
SOURCES_OWN = "source"


@dataclass(frozen=True)
class PromptSet:
    """The prompts of every class under one name; `suffix` marks its metrics."""

    name: str
    suffix: str
    prompts: tuple[tuple[str, ...], ...]

    def described(self) -> np.ndarray:
        """Returns the name with the number of prompts, and a hash of them, to compare two runs."""
        exact = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]
        return np.asarray([f"{self.name} ({sum(map(len, self.prompts))})", exact])


def prompt_sets(
    task: "Classification", classes: Classes, runner: Runner, own: Sequence[str] = ()
) -> list[PromptSet]:
    """Returns the prompt sets of a task; the first one gives the metrics without a suffix.

    Args:
      own: templates that come with the task's source.
    """
    name, templates = task_templates(task, own)
    if name == "dataset":
        sets = [PromptSet("dataset", "", _dataset_prompts(task, classes, runner))]
    else:
        sets = [_filled(name, "", templates, classes)]
        for k in task.template_counts:
            some = prompts.first_templates(templates, k)
            sets.append(_filled(f"{name}, k={k}", f"_k{k}", some, classes))
    english = name in ("simple", "general")
    foreign = [t for t in classes.titles if not any(c.isascii() for c in t if c.isalpha())]
    if english and 2 * len(foreign) > len(classes.titles):
        runner.warn(
            f"the {name} templates are English, the class names are not (such as {foreign[0]!r}): "
            "set templates to a file in their language, or to 'name'."
        )
    if task.general_beside and name != "general":
        sets.append(_filled("general", "_general", prompts.GENERAL, classes))
    return sets


def task_templates(task: "Classification", own: Sequence[str] = ()) -> tuple[str, tuple[str, ...]]:
    """Returns the name of a task's templates, and the templates; () if they are whole sentences.

    Args:
      own: templates that come with the task's source; used if the task names none.

    Raises:
      ValueError or FileNotFoundError: the task's fields, or the file they name, cannot be used.
    """
    name = task.templates or (SOURCES_OWN if own else task.usual_templates())
    if name != "dataset":
        if name == SOURCES_OWN and not own:
            raise ValueError(f"templates={name!r}, but {task.source!r} has no templates.")
        loaded = own if name == SOURCES_OWN else prompts.load_templates(name)
        templates = tuple(map(prompts.canonical, loaded))
        for k in task.template_counts:
            prompts.first_templates(templates, k)
        return name, templates
    if not task.template_source:
        raise ValueError("templates='dataset' needs template_source, a source with sentences.")
    if task.template_counts:
        raise ValueError(
            "template_counts counts templates of a list, but templates='dataset' are whole "
            "sentences; use sentences_per_class."
        )
    return name, ()


def embed_classes(chosen: PromptSet, runner: Runner, tower: str) -> Float[np.ndarray, "c d"]:
    """Returns the class embeddings of a prompt set, by the tower that reads prompts."""
    sentences = [sentence for group in chosen.prompts for sentence in group]
    embeds = runner.sentences(sentences, tower=tower)
    return class_embeds(embeds, [len(group) for group in chosen.prompts])


def _filled(name: str, suffix: str, templates: Sequence[str], classes: Classes) -> PromptSet:
    filled = [
        tuple(prompts.fill(templates, [prompts.readable(n) for n in names]))
        for names in classes.names
    ]
    return PromptSet(name, suffix, tuple(filled))


def _dataset_prompts(
    task: "Classification", classes: Classes, runner: Runner
) -> tuple[tuple[str, ...], ...]:
    """Returns the sentences of `template_source`, by class."""
    view = runner.open(task.template_source, option="template_source")
    texts = runner.texts(view)
    limit = task.sentences_per_class
    if view.class_names is None:
        flat = [text for group in texts for text in group]
        return tuple(map(tuple, task.without_labels(flat, classes.titles)))
    # Matched by name, because another split may number its classes differently.
    place = {name: at for at, name in enumerate(classes.source_names)}
    number = [place.get(name, -1) for name in view.class_names]
    pairs = [
        (text, number[label])
        for group, label in zip(texts, runner.labels(view), strict=True)
        for text in group
        if number[label] >= 0
    ]
    sentences, owners = [text for text, _ in pairs], [at for _, at in pairs]
    groups = prompts.sentences_by_class(sentences, owners, len(classes.names), limit=limit)
    return tuple(map(tuple, groups))


def non_empty(chosen: PromptSet) -> Int[np.ndarray, "u"]:
    """Returns the classes that have a prompt."""
    usable = np.flatnonzero([len(group) for group in chosen.prompts])
    if not len(usable):
        raise ValueError(f"no class has a prompt in the set {chosen.name!r}.")
    return usable
