"""The task zero_shot: pictures, or other items, classified by prompts with their class names."""

from dataclasses import dataclass

from cwcl_jax.evaluation.tasks.classification import Classification
from cwcl_jax.evaluation.tasks.labelled import Cropped


@dataclass(frozen=True)
class ZeroShot(Cropped, Classification):
    """Zero-shot classification; the default templates are the simple ones of Table 3."""

    tower: str = "image"

    def usual_templates(self) -> str:
        return "simple"
