"""One recording or one picture against class names that a person types."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cwcl_jax.data.audio import waveform
from cwcl_jax.data.image import eval_pixels
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.evaluation import prompts
from cwcl_jax.evaluation.encoding import Clock, Encode, encode_sentences
from cwcl_jax.evaluation.tables import Table
from cwcl_jax.evaluation.zero_shot import class_embeds, normalise

_FRAME_SECONDS = 0.025
# Peak of a recording (of 32767) below which nothing can be heard.
_SILENCE = 8
_FULL_SCALE, _CLIPPED_SHARE = 32_700, 0.01


@dataclass(frozen=True)
class Ranked:
    """Class names with their cosine similarities, the best first."""

    names: tuple[str, ...]
    similarities: tuple[float, ...]
    warnings: tuple[str, ...] = ()

    def table(self, title: str) -> Table:
        """Rank, similarity, class."""
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
    modality: str,
    class_names: Sequence[str],
    *,
    encode: Encode,
    data: DataConfig,
    templates: str = "name",
) -> Ranked:
    """Ranks `class_names` for the recording or picture in `path`.

    Raises:
      ValueError: no classes, an unreadable or empty file, a recording shorter than one frame.
    """
    names = list(dict.fromkeys(name.strip() for name in class_names if name.strip()))
    if not names:
        raise ValueError("no class names; give some, separated by commas.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        inputs, warnings = _read(path, modality, data)
    except BadExample as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    if len(names) < len(class_names):
        warnings.append("empty or repeated class names were left out.")
    embed = normalise(np.asarray(encode(modality, inputs), np.float32))[:1]
    # The same words as in tasks, so that a class scores the same here and there.
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


def _read(path: Path, modality: str, data: DataConfig) -> tuple[dict[str, np.ndarray], list[str]]:
    if modality == "image":
        return {"pixels": eval_pixels(path.read_bytes(), data.image)[None]}, []
    inputs = waveform(path.read_bytes(), data.speech)
    length, rate = int(inputs["length"]), data.speech.sample_rate
    if length < _FRAME_SECONDS * rate:
        raise BadExample(
            "audio too short", f"{length} samples at {rate} Hz are less than one frame of 25 ms"
        )
    warnings = []
    samples = inputs["waveform"][:length].astype(np.int32)
    if np.abs(samples).max() < _SILENCE:
        warnings.append("the recording is silent; the ranking means nothing.")
    clipped = float(np.mean(np.abs(samples) >= _FULL_SCALE))
    if clipped > _CLIPPED_SHARE:
        warnings.append(f"the recording is clipped: {clipped:.0%} of it is at full scale.")
    if length >= round(data.speech.max_seconds * rate):
        warnings.append(f"only the first {data.speech.max_seconds:g} s were used.")
    return {name: np.asarray(value)[None] for name, value in inputs.items()}, warnings
