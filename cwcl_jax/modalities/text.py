"""Tokenizes captions to token ids of one fixed length, with an attention mask."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from absl import logging

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities.base import ENDLESS, ArraySpec, Modality, check_ranges
from cwcl_jax.modalities.tokenizer import NO_PROMPT, REPLACED, TextTokenizer, load_tokenizer
from cwcl_jax.weights.sentence_folder import PROMPTS, TEXT_SETTINGS, read_text_settings


@dataclasses.dataclass(frozen=True)
class TextInputs(Modality):
    """How a caption becomes `tokens` (int32) and `mask` (bool), both (max_tokens,).

    If the source has several captions for an example, training reads a random one in each epoch,
    and evaluation the first one.
    """

    name: ClassVar[str] = "text"
    stream: ClassVar[int] = 2

    field: str = "text"
    # "" = the package's own small tokenizer; otherwise a folder, a tokenizer.json or a hub name.
    tokenizer: str = ""
    max_tokens: int = 32
    # Prepended to every text, as sentence encoders are trained with ("query: "). "none" disables
    # the prompt of the weights' own folder.
    prompt: str = ""
    # Converts texts to lower case, whatever the tokenizer does.
    lower_case: bool = False

    def __post_init__(self):
        check_ranges(self, max_tokens=(1, ENDLESS))

    @property
    def loaded(self) -> TextTokenizer:
        """The tokenizer, read once for equal options.

        Raises:
          ValueError: it cannot be read.
        """
        return _loaded(self, _changed_at(self.tokenizer))

    def arrays(self) -> dict[str, ArraySpec]:
        shape = (self.max_tokens,)
        return {"tokens": ArraySpec(shape, "int32"), "mask": ArraySpec(shape, "bool")}

    def prepare(self, value: Any, draws: Draws | None = None) -> str:
        captions = usable_captions(value)
        return captions[0] if draws is None else draws.pick(captions)

    def finish(self, prepared: Sequence[str]) -> Sequence[Mapping[str, np.ndarray]]:
        made = self.loaded(prepared)
        return [{name: array[row] for name, array in made.items()} for row in range(len(prepared))]

    def batch(self, items: Sequence[Any], *, first: int = 0) -> dict[str, np.ndarray]:
        return dict(self.loaded(self.listed(items)))

    def listed(self, items: Any) -> list[str]:
        """Returns one text or many as a list; a tuple of two is two texts, not a pair."""
        listed = [items] if isinstance(items, str) else list(items)
        for number, text in enumerate(listed):
            if not isinstance(text, str):
                raise ValueError(f"item {number} of the texts is {text!r}, which is not a string")
        return listed

    def lost(self, value: Any) -> tuple[str, ...]:
        """Returns remarks on a (first) caption that is truncated or has unknown words."""
        return self.loaded.lost(usable_captions(value)[0])

    def preview(self, value: Any) -> str:
        return usable_captions(value)[0]

    def trim(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Returns sentences cut to the longest, in steps of 8 tokens to limit recompilation."""
        used = np.flatnonzero(np.asarray(arrays["mask"]).any(axis=0))
        length = -(-(int(used[-1]) + 1 if len(used) else 1) // 8) * 8
        return {name: np.asarray(array)[:, :length] for name, array in arrays.items()}

    def fingerprint(self, *, training: bool = True) -> dict[str, Any]:
        made = super().fingerprint(training=training)
        # Options that runs of earlier versions do not know are left out if they change nothing.
        for option in ("prompt", "lower_case"):
            if not made[option]:
                del made[option]
        return made | {"vocabulary": self.loaded.fingerprint()}

    def variants(self, value: Any) -> Sequence[str]:
        return usable_captions(value)

    def check(self, settings: Any, *, options: str, overrides: str, imported: bool) -> None:
        positions = getattr(settings, "max_tokens", self.max_tokens)
        if self.max_tokens > positions:
            raise ValueError(
                f"{options}.max_tokens={self.max_tokens} exceeds the {positions} positions of the "
                f"text tower: lower it, or raise max_tokens in {overrides}"
            )
        try:
            rows, size = getattr(settings, "vocab_size", None), self.loaded.vocab_size
        except ValueError as error:
            raise ValueError(f"{options}: {error}") from error
        padding = getattr(settings, "pad_token", self.loaded.pad_id)
        if padding != self.loaded.pad_id:
            raise ValueError(
                f"the text tower reads its padding, id {padding}, and the tokenizer {options}."
                f"tokenizer={self.tokenizer!r} pads with {self.loaded.pad_id}: name the tower's "
                f"own tokenizer, or set pad_token={self.loaded.pad_id} in {overrides}"
            )
        # Without a check, an id beyond the table would be clamped to its last row. Far fewer ids
        # than the rows of a pretrained table indicate another tokenizer, whose ids stand for other
        # words.
        if rows is not None and (size > rows or (imported and size < rows // 2)):
            raise ValueError(
                f"the tokenizer {options}.tokenizer={self.tokenizer!r} has {size} tokens, the text "
                f"tower's table {rows}: they do not belong together; name the tower's own "
                f"tokenizer, or set vocab_size={size} in {overrides} for one from scratch"
            )

    def check_files(self, folder: Path, options: str) -> None:
        """Checks the options against the text settings of a sentence-transformers folder.

        Raises:
          ValueError: lower case or a default prompt is missing. Other differences are logged.
        """
        theirs = read_text_settings(folder)
        if theirs.lower_case and not self.lower_case:
            raise ValueError(
                f"{folder}: {TEXT_SETTINGS} puts all texts in lower case (do_lower_case): set "
                f"--{options}.lower_case=True"
            )
        if theirs.prompt and not self.prompt:
            raise ValueError(
                f"{folder}: {PROMPTS} puts {theirs.prompt!r} (its prompt {theirs.prompt_name!r}) "
                f"before every text: set --{options}.prompt={theirs.prompt!r}, another, or "
                f"{NO_PROMPT!r} on purpose"
            )
        if theirs.prompts and not self.prompt:
            logging.warning(
                "%s: texts have no prompt, as by default in sentence-transformers; the model has "
                "%s: choose with --%s.prompt",
                folder, ", ".join(f"{n} {p!r}" for n, p in theirs.prompts.items()), options,
            )  # fmt: skip
        if theirs.max_tokens is not None and self.max_tokens > theirs.max_tokens:
            logging.warning(
                "%s: sentence-transformers cuts this model's texts at %d tokens, %s.max_tokens is "
                "%d: longer texts get another embedding than there",
                folder, theirs.max_tokens, options, self.max_tokens,
            )  # fmt: skip

    def without_files(self) -> "TextInputs":
        """Returns the inputs with the package's own tokenizer instead of an external one."""
        return dataclasses.replace(self, tokenizer="")

    def packed(self, folder: Path, tower: str) -> "TextInputs":
        """Writes the tokenizer into the export, unless it is the package's own."""
        if not self.tokenizer:
            return self
        inside = "tokenizer" if tower == self.name else f"tokenizer-{tower}"
        self.loaded.save(folder / inside)
        return dataclasses.replace(self, tokenizer=f"{inside}/tokenizer.json")

    def unpacked(self, folder: Path) -> "TextInputs":
        if not self.tokenizer or not (folder / self.tokenizer).exists():
            return self
        return dataclasses.replace(self, tokenizer=str(folder / self.tokenizer))


def usable_captions(value: Any) -> list[str]:
    """Returns the captions of an example that hold any text, all of it readable.

    Raises:
      BadExample: there is none.
    """
    options = [value] if isinstance(value, str) else value
    filled = [text.strip() for text in options if text and text.strip()]
    usable = [text for text in filled if REPLACED not in text]
    if filled and not usable:
        raise BadExample("text not UTF-8", f"{filled[0][:40]!r}: convert its file to UTF-8")
    if not usable:
        raise BadExample("text empty")
    return usable


def _changed_at(tokenizer: str) -> float:
    """Returns the modification time of a tokenizer's file, so that a changed file is read again."""
    try:
        return Path(tokenizer).stat().st_mtime if tokenizer else 0.0
    except OSError:
        return 0.0


@functools.lru_cache(8)
def _loaded(inputs: TextInputs, changed_at: float) -> TextTokenizer:
    del changed_at
    return load_tokenizer(inputs)
