"""Synthesised speech: another source's text read by espeak-ng, in a voice chosen by the index.

`spoken:commands:train?voices=train`, `spoken:tsv:/sentences.tsv?text=sentence&voices=en-us+f2`.
`keep=auto` (or a folder) synthesises everything once and reads it from there afterwards; `python -m
cwcl_jax.speak` only synthesises.
"""

from collections.abc import Collection, Mapping, Sequence

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example, SameExamples, Source, fingerprint_of
from cwcl_jax.data.sources.recorded import Recorded, default_folder
from cwcl_jax.synthetic.espeak import VOICE_SETS, VOICES, random_voice, speak


class Spoken(SameExamples):
    """The examples of `source`, each with its first non-empty caption as "audio"."""

    def __init__(self, source: Source, *, voices: Sequence[str] = VOICES, seed: int = 0):
        super().__init__(source)
        self.voices = tuple(voices)
        self.seed = seed

    @property
    def durations(self) -> None:
        """Always None: the length of a sentence is unknown before it is synthesised."""

    @property
    def lacks(self) -> Mapping[str, str]:
        lacks = dict(self.source.lacks)
        lacks.pop("audio", None)
        return lacks | ({"audio": lacks["text"]} if "text" in lacks else {})

    def read(self, index: int, fields: Collection[str]) -> Example:
        if "audio" not in fields:
            return self.source.read(index, fields)
        example = self.source.read(index, {*fields, "text"} - {"audio"})
        text = example.get("text") or ""
        captions = [text] if isinstance(text, str) else text
        text = next((caption for caption in captions if caption and caption.strip()), None)
        if text is None:
            raise BadExample("text empty", "no text to synthesise")
        example["audio"] = speak(text, random_voice(Draws(self.seed, 31, index), self.voices))
        return example

    def fingerprint(self) -> str:
        return fingerprint_of("spoken", self.source.fingerprint(), self.voices, self.seed)


def open_spoken(
    source: Source, *, cache_dir: str = "", voices: str = "", voice_seed: int = 0, keep: str = ""
) -> Spoken | Recorded:
    """Opens a source with its text synthesised as speech.

    Args:
      voices: espeak-ng's names separated by commas, or "train" or "test", sets that share neither
          an accent nor a variant.
      voice_seed: another number gives every sentence another voice.
      keep: a folder for the recordings, or "auto": one in the cache folder.
    """
    names = VOICE_SETS.get(voices) or (tuple(voices.split(",")) if voices else VOICES)
    spoken = Spoken(source, voices=names, seed=voice_seed)
    if not keep:
        return spoken
    return Recorded(spoken, default_folder(spoken, cache_dir) if keep == "auto" else keep)
