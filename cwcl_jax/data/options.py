"""Options of the data: which examples, how each tower's inputs are made, how it is read."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cwcl_jax.data.embeddings import DTYPES
from cwcl_jax.modalities import MODALITIES, Modality
from cwcl_jax.modalities.base import ENDLESS, check_ranges

# What a batch may contain for the loss, in addition to the towers' arrays.
BESIDE = ("label", "guide")


def usual_inputs() -> dict[str, Modality]:
    """Returns the built-in modalities that read raw inputs, under their own names."""
    return {name: kind() for name, kind in MODALITIES.items() if kind().field}


@dataclass(frozen=True)
class DataConfig:
    """The data of a run. `train` is a source line: `kind:path?option=value`, mixed with `::`.

    Attributes:
      inputs: how the inputs of each tower are made, by the tower's name. In a config they are next
          to the other fields, as `config.data.<tower>`.
    """

    train: str = "scenes:train"
    # Number of examples in an epoch, drawn from all without replacement; 0 = all.
    examples_per_epoch: int = 0
    shuffle: bool = True
    # Which examples share a batch: groups:COLUMN?k=1, near:FEATURES?share=0.5&size=8, or your own
    # module:function; "" = random batches. See `data.composers`.
    batches: str = ""
    # Shares of a mixture's parts: p ~ n^(1/temperature), where n are their lengths or the weights
    # in the line. 1 = proportional to n, large = equal shares.
    mixture_temperature: float = 1.0
    # Which pairs of a batch have equal labels, for losses that use labels: "class" (the source's
    # labels), "text" (equal captions, ignoring case), "sets" (several labels per example,
    # `labels=COLUMN` of the source line), "" = no labels.
    labels: str = ""
    # For sets: the separator of labels in one string ("" = a string is one label), and the maximal
    # number of labels; an example with more is unusable.
    label_separator: str = ";"
    max_labels: int = 8
    # Name of features that come with the examples and that no tower reads: the loss computes its
    # weights (or masks) from them instead of from U's features. "" = from U's.
    guide: str = ""
    inputs: Mapping[str, Modality] = field(default_factory=usual_inputs)
    # Reader threads; 0 = one for each core that this process may use, at most 16.
    threads: int = 0
    # Batches that are read ahead on the host.
    prefetch: int = 2
    # Folder for indexes of tars, spoken sentences and locked features; "" = indexes next to the
    # tars, everything else in the user's cache folder.
    cache_dir: str = ""
    # Run the locked encoders over the training data once, before the first step, and store their
    # features, for all captions of an example and all `views` of a tower's inputs. Features of
    # prompts and test items are stored, too.
    keep_locked_features: bool = False
    # Dtype of stored features: "float32", "bfloat16" or "float16". The rounding error is logged.
    kept_dtype: str = "float32"
    # The run fails if a larger share of the examples read so far is unusable.
    max_skipped_share: float = 0.01
    # Training is refused if a larger share of a sample of the data is truncated for a tower (at
    # max_tokens or max_seconds), or spelt in single letters by the package's own tokenizer.
    max_cut_share: float = 0.5
    # Source line of the data for the held-out loss during training; or the share of `train` that is
    # held out for it (chosen by the seed).
    validation: str = ""
    validation_share: float = 0.0
    # Steps between these measurements, and the number of global batches, always the same ones.
    validation_every_steps: int = 100
    validation_batches: int = 8
    # Whether these batches are composed as `batches` says; otherwise they are random.
    validation_composed: bool = False

    def __post_init__(self):
        if self.labels not in ("", "class", "text", "sets"):
            raise ValueError(f"labels={self.labels!r} is not one of '', 'class', 'text', 'sets'.")
        if self.kept_dtype not in DTYPES:
            raise ValueError(f"kept_dtype={self.kept_dtype!r} is not one of {', '.join(DTYPES)}.")
        check_ranges(
            self,
            examples_per_epoch=(0, ENDLESS),
            threads=(0, ENDLESS),
            prefetch=(0, ENDLESS),
            max_skipped_share=(0, 1),
            max_cut_share=(0, 1),
            max_labels=(1, ENDLESS),
            validation_every_steps=(1, ENDLESS),
            validation_batches=(1, ENDLESS),
        )
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} must be in [0, 1).")
        if self.validation and self.validation_share:
            raise ValueError("validation and validation_share cannot be combined: unset one.")

        if self.batches and not self.shuffle:
            raise ValueError("batches needs shuffle=True: a composer determines the order itself.")
        if self.validation_composed and not (self.batches and self.validates):
            raise ValueError("validation_composed needs batches, and a validation.")
        if not 0 < self.mixture_temperature < math.inf:
            raise ValueError(
                f"mixture_temperature={self.mixture_temperature} must be a positive number."
            )

    @property
    def validates(self) -> bool:
        """Whether a held-out loss is measured."""
        return bool(self.validation or self.validation_share)

    def inputs_of(self, tower: str) -> Modality:
        """Returns how the inputs of a tower are made.

        Raises:
          ValueError: there is no such tower.
        """
        if tower not in self.inputs:
            raise ValueError(f"there are no inputs for {tower!r}; known: {', '.join(self.inputs)}.")
        return self.inputs[tower]


def label_shape(config: DataConfig) -> tuple[int, ...]:
    """Returns the shape of one example's label: one integer, or a row of them for sets."""
    return (config.max_labels,) if config.labels == "sets" else ()


def features_name(tower: str, modality: Modality) -> str:
    """Returns the name under which a source provides the features that a tower reads."""
    return (modality.field if reads_features(modality) else "") or tower


def reads_features(modality: Modality) -> bool:
    """Returns whether a modality reads features instead of raw inputs."""
    return "features" in modality.arrays()


def given_as_features(tower: str, modality: Modality, embedded: Collection[str]) -> bool:
    """Returns whether a source that provides the features `embedded` provides a tower's."""
    return features_name(tower, modality) in embedded
