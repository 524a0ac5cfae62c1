"""What to evaluate: one frozen `TaskConfig` per task, gathered in an `EvaluationConfig`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = (
    "zero_shot",
    "intent",
    "keywords",
    "retrieval",
    "alignment",
    "linear_probe",
    "few_shot",
)
SPEECH_KINDS = ("intent", "keywords")
CLASSIFICATION_KINDS = ("zero_shot", *SPEECH_KINDS)
PROBE_KINDS = ("linear_probe", "few_shot")
UNMAPPED = ("error", "drop")
FEATURES = ("embeds", "features")
# The smallest value of every whole number. Blocks of a matrix need two classes of two items each.
_LEAST = {
    "max_items": 0,
    "sentences_per_class": 0,
    "crop_border": 0,
    "classes": 2,
    "items_per_class": 2,
    "repeats": 1,
    "bootstrap": 0,
    "seed": 0,
}
# Task names are names of files and parts of settings.
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class TaskConfig:
    """One task. Fields that a kind does not use are ignored by it.

    `templates` is "simple" (Table 3), "general" (A.3.5), "name" (the bare class name), "dataset"
    (sentences of `template_source`, by class) or a file of the user's (`prompts.load_templates`);
    "" is simple for zero_shot, dataset for intent, and for keywords dataset where there is a
    `template_source`, else name. intent and keywords add the general templates to theirs.
    """

    kind: str = "zero_shot"
    source: str = ""  # a source specification, as in data.train
    # The side that is not text; "" = speech for intent and keywords, image for the others.
    modality: str = ""
    max_items: int = 0  # 0 = all

    # Classes and prompts (zero_shot, intent, keywords).
    templates: str = ""
    template_counts: tuple[int, ...] = ()  # e.g. (1, 5, 10): also with the first k templates
    template_source: str = ""  # source whose sentences are the templates of "dataset"
    sentences_per_class: int = 0  # at most so many of them per class; 0 = all
    class_names: str = ""  # file, or names separated by commas; "" = the source's own
    class_subset: str = ""  # file with the classes (names or indices) that stay candidates
    unmapped_classes: str = "error"  # "drop": leave out classes that class_names does not list
    top_k: tuple[int, ...] = (1, 5)  # 1 is always among them
    text_upper_bound: bool = True  # intent, keywords: classify the reference texts too
    in_distribution: str = ""  # the task whose accuracy robustness is measured against
    crop_border: int = 0  # pixels cut off every side first (ObjectNet's red frame: 2)

    # Retrieval. The other side is the items' captions, or another modality of the same items.
    partner: str = "text"
    recall_k: tuple[int, ...] = (1, 5, 10)

    # Alignment (Figures 7 and 8).
    classes: int = 6
    items_per_class: int = 20

    # Linear probe and few-shot on frozen features.
    train_source: str = ""
    features: str = "embeds"  # embeds | features (before the projection head)
    shots: tuple[int, ...] = (1, 5, 10)
    repeats: int = 5

    # Uncertainty.
    bootstrap: int = 1000  # resamples for the intervals; 0 = none
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        if not self.modality:
            usual = "speech" if self.kind in SPEECH_KINDS else "image"
            object.__setattr__(self, "modality", usual)
        _one_of("unmapped_classes", self.unmapped_classes, UNMAPPED)
        _one_of("features", self.features, FEATURES)
        for name in ("template_counts", "top_k", "recall_k", "shots"):
            values = getattr(self, name)
            if any(k < 1 for k in values):
                raise ValueError(f"task field {name}={values!r}: every number must be at least 1.")
        for name in ("recall_k", "shots"):
            if not getattr(self, name):
                raise ValueError(f"task field {name} is empty; give a number, such as (1,).")
        if 1 not in self.top_k:  # robustness and the curves over templates are of top-1
            object.__setattr__(self, "top_k", (1, *self.top_k))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"task field {name}={value}: must be at least {least}.")
        if self.kind == "retrieval" and self.partner == self.modality:
            raise ValueError(
                f"task field partner={self.partner!r} is the modality itself; retrieval is between "
                "two modalities of the same items."
            )
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(
                f"task field confidence={self.confidence}: give a share between 0 and 1, e.g. 0.95."
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """The tasks of an experiment, and how often training runs them."""

    every_steps: int = 0  # 0 = only at the end of training
    batch_size: int = 256  # examples per encode call; the last batch is padded to it
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    # CSV of baseline models for effective robustness: task, in_distribution, shifted.
    robustness_baselines: str = ""

    def __post_init__(self) -> None:
        for name in self.tasks:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"evaluation.tasks: {name!r} cannot name a task (its files are called after "
                    "it); use letters, digits, '_', '-' and '.'."
                )
        if self.batch_size < 1:
            raise ValueError(f"evaluation.batch_size={self.batch_size}: must be at least 1.")
        if self.every_steps < 0:
            raise ValueError(f"evaluation.every_steps={self.every_steps}: must be 0 or more.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"task field {name}={value!r} is not known; use one of {list(allowed)}.")
