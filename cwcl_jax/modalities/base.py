"""What a modality is: everything that the package may ask about one kind of input.

A modality is a frozen dataclass. Its fields are its options, which a config sets as
`config.data.<tower>`; its methods contain all knowledge about this kind of input. The data
pipeline, the checks, the feature cache, `embed`, `evaluate`, `plan`, `export` and `load_model` use
these methods and know no modality by name. A custom modality:

    @dataclasses.dataclass(frozen=True)
    class Eeg(Modality):
        field: str = "eeg"
        channels: int = 8
        samples: int = 256

        def arrays(self):
            return {"signal": ArraySpec((self.channels, self.samples), "float32")}

        def prepare(self, value, draws=None):
            return {"signal": np.asarray(value, np.float32)}

is named in a config as `modality="my_module:Eeg"`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample

ENDLESS = math.inf


class ArraySpec(NamedTuple):
    """Shape and dtype of one array of one example, without the batch axis."""

    shape: tuple[int, ...]
    dtype: str


class WrongInputs(ValueError):
    """A modality fails on a value, or its arrays differ from those it declares.

    This is an error of the modality, not of one example.
    """


@dataclasses.dataclass(frozen=True)
class Modality:
    """One kind of input. A subclass defines `arrays` and `prepare`; everything else has a default.

    Attributes:
      field: the field of a source's example that holds the raw value.
      name: name of a built-in modality in a config; "" for a user's modality.
      core_seconds: CPU seconds to decode an example from a file of usual size; 0 if negligible.
      stream: separates the random draws of this modality from those of others.
      training_only: options that only training uses, such as random crops.
      has_border: whether `without_border` can crop a border.
      views: an option of modalities with random inputs: training draws among so many fixed views
        of each example (`data.views`); 0 for new random numbers each time.
    """

    name: ClassVar[str] = ""
    core_seconds: ClassVar[float] = 0.0
    stream: ClassVar[int] = 0
    training_only: ClassVar[tuple[str, ...]] = ()
    has_border: ClassVar[bool] = False
    views: ClassVar[int] = 0

    field: str = ""

    # Every modality must define these.

    def arrays(self) -> dict[str, ArraySpec]:
        """Returns the arrays of one example by name, as `prepare` and `finish` create them."""
        raise NotImplementedError(f"{type(self).__name__} must define arrays()")

    def prepare(self, value: Any, draws: Draws | None = None) -> Any:
        """Returns the arrays of one example by name, from its raw value.

        Args:
          value: the source's value in `field`.
          draws: random numbers of this example for training; None means no randomness.

        Raises:
          BadExample: the value cannot be used. The example is counted and skipped.
        """
        raise NotImplementedError(f"{type(self).__name__} must define prepare()")

    # Most modalities need not change these.

    def finish(self, prepared: Sequence[Any]) -> Sequence[Mapping[str, np.ndarray]]:
        """Returns the arrays of several examples from the results of `prepare`, in one call."""
        return prepared

    def batch(self, items: Sequence[Any], *, first: int = 0) -> dict[str, np.ndarray]:
        """Returns the stacked arrays of items that a user holds; see `opened`.

        Args:
          first: the number of the first item, for error messages.

        Raises:
          BadExample, ValueError: an item cannot be used; the message names its path or number.
        """
        made = each(lambda item: prepared(self, self.opened(item)), items, first)
        rows = each(lambda row: fitting(self, row), self.finish(made), first)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def listed(self, items: Any) -> list[Any]:
        """Returns one item or many as a list."""
        return list(items) if isinstance(items, (list, tuple)) else [items]

    def opened(self, item: Any) -> Any:
        """Returns an item that a user holds (a path, an array, ...) as a value for `prepare`."""
        return item

    def trim(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Returns the batch without padding that no row needs, at one of a few lengths."""
        return arrays

    def fingerprint(self, *, training: bool = True) -> dict[str, Any]:
        """Returns everything that determines the arrays (without `training`, in evaluation)."""
        made = dataclasses.asdict(self)
        if self.field == type(self).__dataclass_fields__["field"].default:
            del made["field"]  # the default field adds nothing to the source's fingerprint
        if not self.views:
            made.pop("views", None)
        return {k: v for k, v in made.items() if training or k not in self.training_only}

    def varies(self, source: Any) -> str:
        """Returns why random inputs are new in each epoch, and the remedy; "" if they are not.

        Features of a locked encoder can be stored only for a list of inputs: one for each of an
        example's `variants`, or for each of its `views`.

        Args:
          source: the training data.
        """
        del source
        return ""

    def variants(self, value: Any) -> Sequence[Any]:
        """Returns the raw values that a value consists of, such as several captions.

        `prepare` with draws takes one of them by its first number, without draws the first.

        Raises:
          BadExample: the value cannot be used.
        """
        return [value]

    def fitted(self, overrides: Mapping[str, Any]) -> "Modality":
        """Returns the inputs with the options that the encoder's own settings determine."""
        del overrides
        return self

    def check(self, settings: Any, *, options: str, overrides: str, imported: bool) -> None:
        """Raises ValueError if an encoder cannot read these inputs.

        Args:
          settings: the encoder's own settings.
          options: path of this modality's options, for error messages.
          overrides: path of the encoder's settings, for error messages.
          imported: whether the encoder's weights come from a file.
        """
        del settings, options, overrides, imported

    def check_files(self, folder: Path, options: str) -> None:
        """Raises ValueError if the files next to imported weights require other inputs.

        Args:
          folder: folder of the weights.
          options: path of this modality's options, for error messages.
        """
        del folder, options

    def remarks(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns remarks on items that a reader of results should know.

        Returns:
          Remark ("silent", ...) -> which rows it applies to, bool (b,).
        """
        del arrays
        return {}

    def lost(self, value: Any) -> tuple[str, ...]:
        """Returns remarks on what the arrays lose of a raw value; () if they hold all of it.

        Each remark completes "12 of 100 texts are ..."; equal ones are counted together.

        Raises:
          BadExample: the value cannot be used.
        """
        del value
        return ()

    def preview(self, value: Any) -> Any:
        """Returns what a report shows of a raw value (see `evaluation.plots.draw_item`).

        Returns:
          A picture, uint8 (y, x, 3); a text; or numbers (n,) or (lines, n), drawn as lines.
        """
        return value if isinstance(value, str) else np.asarray(value)

    def without_border(self, value: Any, pixels: int) -> Any:
        """Returns a raw value without `pixels` on every side, for modalities with a border."""
        del value, pixels
        raise ValueError(f"{type(self).__name__} inputs have no border: leave out crop_border")

    # Lengths, for modalities that gain from batches of several lengths.

    @property
    def lengths(self) -> tuple[float, ...]:
        """The allowed lengths of a batch, ascending, in the source's unit; () for one length."""
        return ()

    @property
    def window(self) -> int:
        """Number of batches that are sorted by length together."""
        return 1

    def at_length(self, length: float) -> "Modality":
        """Returns the same modality for batches of another length."""
        raise NotImplementedError(f"{type(self).__name__} has one length only: {length}")

    def fitting(self, value: Any, length: float) -> "Modality":
        """Returns `at_length(length)`.

        Raises:
          BadExample: the value is longer than its source said when the batch was composed.
        """
        del value
        return self.at_length(length)

    # Files.

    def without_files(self) -> "Modality":
        """Returns the inputs for planning, if none of their files is available."""
        return self

    def packed(self, folder: Path, tower: str) -> "Modality":
        """Writes files that the inputs need into an export; returns options that name these."""
        del folder, tower
        return self

    def unpacked(self, folder: Path) -> "Modality":
        """Returns the options of an export with the full paths of its files."""
        del folder
        return self


def prepared(modality: Modality, value: Any, draws: Draws | None = None) -> Any:
    """Returns the result of `prepare`; non-finite numbers make an example unusable.

    Raises:
      BadExample: the value cannot be used.
      WrongInputs: `prepare` fails.
    """
    try:
        made = modality.prepare(value, draws)
    except BadExample:
        raise
    except Exception as error:
        raise WrongInputs(
            f"{type(modality).__name__}.prepare fails on {_shown(value)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    for name, array in made.items() if isinstance(made, Mapping) else ():
        if np.asarray(array).dtype.kind == "f" and not np.isfinite(array).all():
            raise BadExample(f"{name} not finite", "NaN or infinity")
    return made


def fitting(modality: Modality, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of one example in the dtypes that `arrays()` declares.

    Raises:
      WrongInputs: they have other names, shapes, or another kind of numbers.
    """
    made = {name: np.asarray(array) for name, array in arrays.items()}
    specs: dict[str, ArraySpec] = {}
    for one in [modality.at_length(length) for length in modality.lengths] or [modality]:
        specs = one.arrays()
        if made.keys() == specs.keys() and all(_fits(n, made[n], specs[n]) for n in specs):
            return {n: array.astype(specs[n].dtype, copy=False) for n, array in made.items()}
    said = {name: f"{dtype}{list(shape)}" for name, (shape, dtype) in specs.items()}
    found = {name: f"{array.dtype}{list(array.shape)}" for name, array in made.items()}
    kind = type(modality).__name__
    raise WrongInputs(f"{kind} gives {found} for one example, but {kind}.arrays() declares {said}")


def _fits(name: str, array: np.ndarray, spec: ArraySpec) -> bool:
    # Features may have any shape unless one is declared.
    same_shape = array.shape == tuple(spec.shape) or (name == "features" and not spec.shape)
    return same_shape and array.dtype.kind == np.dtype(spec.dtype).kind


def _shown(value: Any) -> str:
    """Returns a value for an error message: an array by its dtype and shape."""
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype}{list(value.shape)}"
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) < 80 else text[:77] + '...'}"


def check_ranges(options: Any, **ranges: tuple[float, float]) -> None:
    """Raises ValueError if a number is outside its range, ends included."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if not low <= value <= high:
            wanted = f"at least {low}" if high == ENDLESS else f"between {low} and {high}"
            raise ValueError(f"{name}={value} must be {wanted}.")


def check_views(views: int, varies: bool) -> None:
    """Raises ValueError for a number of views that is none, or of inputs that do not vary."""
    if views and (views < 2 or not varies):
        raise ValueError(
            f"views={views} must be 0 (no limit) or at least 2, the first of which evaluation "
            "sees, and needs options that make them random."
        )


def each(function: Callable[[Any], Any], items: Sequence[Any], first: int) -> list[Any]:
    """Returns `function` of every item; an error names the path, or the number from `first`."""
    results = []
    for number, item in enumerate(items, first):
        name = str(item) if isinstance(item, (str, Path)) else f"item {number}"
        try:
            results.append(function(item))
        except BadExample as error:
            raise BadExample(error.kind, f"{name}: {error.detail}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return results
