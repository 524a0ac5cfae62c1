"""The tasks intent and keywords: recordings classified by prompts (CWCL Tables 8 and 9).

Both report results with the data set's own sentences and with the general templates (the # columns
of Table 8), and the text upper bound: the reference texts classified by the text tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cwcl_jax.evaluation import prompts
from cwcl_jax.evaluation.encoding import Items
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.tables import Table, percent
from cwcl_jax.evaluation.tasks.classification import Classification

# CWCL Table 9: keyword spotting on Speech Commands V2 by models that were trained on its labels.
SUPERVISED_KEYWORDS = {
    "Attention RNN": 0.939,
    "KWT-2": 0.9774,
    "Wav2Vec2": 0.966,
    "M2D": 0.954,
    "M2D, fine-tuned": 0.985,
}


@dataclass(frozen=True)
class Spoken(Classification):
    """What intent and keywords share."""

    tower: str = "speech"
    text_upper_bound: bool = True  # also classify the reference texts

    general_beside: ClassVar[bool] = True

    def reference_texts(self, items: Items) -> list[str]:
        if not all(items.captions):
            return []
        return [captions[0] for captions in items.captions]

    def classifies_texts(self) -> bool:
        return self.text_upper_bound


@dataclass(frozen=True)
class Intent(Spoken):
    """Intent classification; by default prompts are `template_source`'s sentences by intent."""

    def usual_templates(self) -> str:
        if self.template_source:
            return "dataset"
        raise ValueError(
            "an intent task takes its templates from the data set's own sentences: set "
            "template_source (e.g. slurp:/data/slurp?split=devel), or templates='general'."
        )


@dataclass(frozen=True)
class Keywords(Spoken):
    """Keyword spotting; the default templates are sentences of `template_source`, or bare words."""

    def usual_templates(self) -> str:
        return "dataset" if self.template_source else "name"

    def without_labels(self, sentences: Sequence[str], titles: Sequence[str]) -> list[list[str]]:
        return prompts.sentences_with_word(sentences, titles, limit=self.sentences_per_class)

    @classmethod
    def published(cls, results: Sequence[TaskResult]) -> list[Table]:
        sources = [result.task.source for result in results if result.kind == "keywords"]
        same = any("speech_commands:" in source for source in sources)
        return [supervised_keywords()] if same else []


def supervised_keywords() -> Table:
    """Returns Table 9's supervised models, to compare with zero-shot keyword spotting."""
    rows = tuple((name, percent(value)) for name, value in SUPERVISED_KEYWORDS.items())
    return Table(
        "Supervised keyword spotting (CWCL Table 9, Speech Commands V2)",
        ("model", "top-1 %"),
        rows,
        ("Published figures of models trained on labelled keywords; not measured here.",),
    )
