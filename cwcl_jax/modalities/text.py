"""Captions to token ids of one fixed length, with an attention mask."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from absl import logging
from jaxtyping import Bool, Int32

from cwcl_jax.data.cuts import tell_cut
from cwcl_jax.data.draws import Draws
from cwcl_jax.data.installed import inside_package
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities.base import ENDLESS, ArraySpec, Modality, check_ranges
from cwcl_jax.synthetic.captions import TOKENIZER_FILE
from cwcl_jax.weights.sentence_folder import PROMPTS, TEXT_SETTINGS, read_text_settings

_SETTINGS = "tokenizer_config.json"
# What the special tokens are called where a file does not say so.
_USUAL = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "bos_token": ("[BOS]", "[CLS]", "<s>"),
    "eos_token": ("[EOS]", "[SEP]", "</s>"),
}
# A prompt of this name is none, on purpose.
_NO_PROMPT = "none"
# The package's own tokenizer, made for captions of its own scenes.
_OWN = "scenes"
OUTSIDE_SCENES = "outside the words of the package's tokenizer for scenes, spelt in letters"
# What stands for bytes that no UTF-8 can be, in this package's reading or an earlier one.
_REPLACED = "\ufffd"
# Whether examples have several captions is a matter of the source: a few of them tell.
_LOOKED_AT = 100


@dataclasses.dataclass(frozen=True)
class TextInputs(Modality):
    """How a caption becomes `tokens` (int32) and `mask` (bool), both (max_tokens,).

    A tower whose source has several captions for an example reads another one in each epoch of
    training, and the first one in evaluation.
    """

    name: ClassVar[str] = "text"
    stream: ClassVar[int] = 2

    field: str = "text"
    # "" = the package's own small tokenizer; otherwise a folder, a tokenizer.json or a hub name.
    tokenizer: str = ""
    max_tokens: int = 32
    # Put before every text, as sentence encoders are trained with ("query: "). "none" is no prompt
    # where the weights' own folder has one.
    prompt: str = ""
    # Makes small letters of all, whatever the tokenizer does.
    lower_case: bool = False

    def __post_init__(self):
        check_ranges(self, max_tokens=(1, ENDLESS))

    @property
    def loaded(self) -> "TextTokenizer":
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
                raise ValueError(f"item {number} of the texts is {text!r}, which is no string")
        return listed

    def lost(self, value: Any) -> tuple[str, ...]:
        """Names a (first) caption that is cut, or has words that the tokenizer does not know."""
        return self.loaded.lost(usable_captions(value)[0])

    def preview(self, value: Any) -> str:
        return usable_captions(value)[0]

    def trim(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Cuts sentences to the longest of them, in steps of 8 tokens so that programs are few."""
        used = np.flatnonzero(np.asarray(arrays["mask"]).any(axis=0))
        length = -(-(int(used[-1]) + 1 if len(used) else 1) // 8) * 8
        return {name: np.asarray(array)[:, :length] for name, array in arrays.items()}

    def fingerprint(self, *, training: bool = True) -> dict[str, Any]:
        made = super().fingerprint(training=training)
        # Options that runs of earlier versions do not know, where they change nothing.
        for option in ("prompt", "lower_case"):
            if not made[option]:
                del made[option]
        return made | {"vocabulary": self.loaded.fingerprint()}

    def varies(self, source: Any) -> str:
        found = with_several_captions(source, self.field)
        if not found:
            return ""
        return f"{found}, of which every epoch takes another one; keep one caption an example"

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
        # An id beyond the table would be clamped to its last row without a word; far fewer ids than
        # a pretrained table has rows mean another tokenizer, whose ids stand for other words.
        if rows is not None and (size > rows or (imported and size < rows // 2)):
            raise ValueError(
                f"the tokenizer {options}.tokenizer={self.tokenizer!r} has {size} tokens, the text "
                f"tower's table {rows}: they do not belong together; name the tower's own "
                f"tokenizer, or set vocab_size={size} in {overrides} for one from scratch"
            )

    def check_files(self, folder: Path, options: str) -> None:
        """Compares with what sentence-transformers does to texts before this folder's encoder."""
        theirs = read_text_settings(folder)
        if theirs.lower_case and not self.lower_case:
            raise ValueError(
                f"{folder}: {TEXT_SETTINGS} makes small letters of all texts (do_lower_case): set "
                f"--{options}.lower_case=True"
            )
        if theirs.prompt and not self.prompt:
            raise ValueError(
                f"{folder}: {PROMPTS} puts {theirs.prompt!r} (its prompt {theirs.prompt_name!r}) "
                f"before every text: set --{options}.prompt={theirs.prompt!r}, another, or "
                f"{_NO_PROMPT!r} on purpose"
            )
        if theirs.prompts and not self.prompt:
            logging.warning(
                "%s: texts have no prompt, as by default in sentence-transformers; the model knows "
                "%s: choose with --%s.prompt",
                folder, ", ".join(f"{n} {p!r}" for n, p in theirs.prompts.items()), options,
            )  # fmt: skip
        if theirs.max_tokens is not None and self.max_tokens > theirs.max_tokens:
            logging.warning(
                "%s: sentence-transformers cuts this model's texts at %d tokens, %s.max_tokens is "
                "%d: longer ones get another embedding than there",
                folder, theirs.max_tokens, options, self.max_tokens,
            )  # fmt: skip

    def without_files(self) -> "TextInputs":
        """Takes the package's own few words in place of a tokenizer that lies elsewhere."""
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
    usable = [text for text in filled if _REPLACED not in text]
    if filled and not usable:
        raise BadExample("text not UTF-8", f"{filled[0][:40]!r}: convert its file to UTF-8")
    if not usable:
        raise BadExample("text empty")
    return usable


def with_several_captions(source: Any, field: str) -> str:
    """Names an example with several captions, out of some spread over the source; "" if none."""
    for index in np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT)).astype(int):
        try:
            example = source.read(int(index), (field,))
            captions = usable_captions(example.get(field) or "")
        except BadExample:
            continue
        if len(set(captions)) > 1:
            return f"{example['id']} has {len(captions)} captions"
    return ""


def _changed_at(tokenizer: str) -> float:
    """When a tokenizer's file was changed last: a changed one is read anew."""
    try:
        return Path(tokenizer).stat().st_mtime if tokenizer else 0.0
    except OSError:
        return 0.0


@functools.lru_cache(8)
def _loaded(inputs: TextInputs, changed_at: float) -> "TextTokenizer":
    del changed_at
    return load_tokenizer(inputs)


class TextTokenizer:
    """Tokenizes lists of captions; longer ones are cut so that their end token stays."""

    def __init__(
        self,
        backend: Any,
        special: Mapping[str, str],
        *,
        max_tokens: int,
        name: str,
        prompt: str = "",
        lower_case: bool = False,
    ):
        """Build from a `tokenizers.Tokenizer` and the names of its special tokens."""
        self._fast = _with_small_letters(backend) if lower_case else backend
        self.prompt = prompt
        """Put before every text; `save` does not write it."""
        self.name = name
        self.is_own = name == _OWN
        self.max_tokens = max_tokens
        self.special_tokens = self._present(special)
        """Tokens of the vocabulary by name: "pad_token", "bos_token", "eos_token" and others."""
        self.pad_id = self._special_id("pad_token", default=0)
        self.bos_id = self._special_id("bos_token", default=None)
        self.eos_id = self._special_id("eos_token", default=None)
        self._fast.enable_truncation(max_tokens)
        # Sides of a saved file do not matter here: towers expect padding on the right.
        self._fast.enable_padding(direction="right", pad_id=self.pad_id, length=max_tokens)

    def _present(self, special: Mapping[str, str]) -> dict[str, str]:
        """Those that the vocabulary has, with the usual ones where nothing else is said."""
        usual = [(name, token) for name, tokens in _USUAL.items() for token in tokens]
        present: dict[str, str] = {}
        for name, token in [*special.items(), *usual]:
            if self._fast.token_to_id(token) is not None:
                present.setdefault(name, token)
        return present

    def _special_id(self, name: str, default: int | None) -> Any:
        token = self.special_tokens.get(name)
        return default if token is None else self._fast.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self._fast.get_vocab_size(with_added_tokens=True)

    def fingerprint(self) -> str:
        """Changes with the vocabulary, the rules and the length."""
        text = self._fast.to_str() + str(self.max_tokens) + self.prompt
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(
        self, captions: Sequence[str]
    ) -> dict[str, Int32[np.ndarray, "b s"] | Bool[np.ndarray, "b s"]]:
        """`tokens` and `mask` of the captions, padded on the right."""
        encoded = self._fast.encode_batch([self.prompt + text for text in captions])
        tell_cut(lambda: sum(_length(rest) for e in encoded for rest in e.overflowing))
        tokens = np.array([e.ids for e in encoded], np.int32).reshape(-1, self.max_tokens)
        mask = np.array([e.attention_mask for e in encoded], bool).reshape(-1, self.max_tokens)
        return {"tokens": tokens, "mask": mask}

    def lost(self, caption: str) -> tuple[str, ...]:
        """What of a caption its tokens do not hold, in words (see `Modality.lost`)."""
        encoded = self._fast.encode(self.prompt + caption)
        pieces = [encoded, *encoded.overflowing]
        remarks = [f"cut at max_tokens={self.max_tokens}"] if encoded.overflowing else []
        if _REPLACED in caption:
            remarks.append("not UTF-8 in their file: letters are lost (U+FFFD)")
        unknown = self.special_tokens.get("unk_token", "")
        tokens = [token for piece in pieces for token in piece.tokens]
        # One piece behind a word is an ending, such as a plural's.
        pairs = itertools.pairwise(tokens)
        spelt = any(one.startswith("##") and two.startswith("##") for one, two in pairs)
        if self.is_own and (spelt or unknown in tokens):
            remarks.append(OUTSIDE_SCENES)
        elif unknown in tokens and unknown not in caption:
            remarks.append(f"with words that the tokenizer does not know ({unknown})")
        return tuple(remarks)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, and the names of special tokens beside it.

        `load_tokenizer` of the file and transformers' `AutoTokenizer` of the folder give equal ids.
        """
        from tokenizers import Tokenizer

        plain = Tokenizer.from_str(self._fast.to_str())
        plain.no_truncation()
        plain.no_padding()
        folder.mkdir(parents=True, exist_ok=True)
        plain.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_tokens,
            "model_input_names": ["input_ids", "attention_mask"],
            **self.special_tokens,
        }
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (folder / _SETTINGS).write_text(text, encoding="utf-8")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fast": self._fast.to_str()}

    def __setstate__(self, state: dict) -> None:
        from tokenizers import Tokenizer

        self.__dict__.update(state, _fast=Tokenizer.from_str(state["_fast"]))


def _length(encoded: Any) -> int:
    """Number of tokens without padding and special ones."""
    return sum(encoded.attention_mask) - sum(
        special and used
        for special, used in zip(encoded.special_tokens_mask, encoded.attention_mask, strict=True)
    )


def _with_small_letters(backend: Any) -> Any:
    """A backend whose first step is to make small letters of all."""
    from tokenizers import normalizers

    steps = [normalizers.Lowercase()]
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def load_tokenizer(inputs: TextInputs) -> TextTokenizer:
    """The tokenizer that the options name: the package's own, a folder, a file, or a hub name."""
    # Batches are small and several threads read: the library's own threads would only add load.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if inputs.max_tokens < 3:
        raise ValueError(
            f"max_tokens={inputs.max_tokens} leaves no room for a word between the "
            "begin and end tokens; use 3 or more."
        )
    name = inputs.tokenizer or str(TOKENIZER_FILE)
    if name.startswith("installed:"):
        name = str(_inside_package(name.removeprefix("installed:")))
    backend, special = _from_file(name) if Path(name).is_file() else _from_folder_or_hub(name)
    shown = inputs.tokenizer or _OWN
    return TextTokenizer(
        backend,
        special,
        max_tokens=inputs.max_tokens,
        name=shown,
        prompt="" if inputs.prompt == _NO_PROMPT else inputs.prompt,
        lower_case=inputs.lower_case,
    )


def _inside_package(spec: str) -> Path:
    try:
        return inside_package(spec)
    except FileNotFoundError as error:
        raise ValueError(f"tokenizer='installed:{spec}': {error}") from error


def _from_file(name: str) -> tuple[Any, dict[str, str]]:
    """The backend of a tokenizer.json, and its special tokens as the settings beside it say."""
    from tokenizers import Tokenizer

    settings = Path(name).with_name(_SETTINGS)
    try:
        backend = Tokenizer.from_file(name)
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    except Exception as error:  # the library raises no narrower one
        raise ValueError(
            f"tokenizer={name!r} (with {_SETTINGS} beside it) cannot be read: {error}"
        ) from error
    # A token is written with its flags, or alone.
    tokens = {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in named.items()
        if key.endswith("_token")
    }
    return backend, {key: token for key, token in tokens.items() if isinstance(token, str)}


def _require_hub(kind: Any, name: str) -> None:
    """Raises OSError at once where a name is no folder, not kept here, and the hub is out of reach.

    The hub's library would ask for each file several times, for a minute altogether.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError("there is no such folder")
    try:
        kind.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(hub, timeout=5).close()
        except urllib.error.HTTPError:  # it answers
            return
        except OSError as error:
            raise OSError(f"there is no such folder, and {hub} cannot be reached") from error


_TOKENIZER_FILE = re.compile(r"tokenizer\.json|.*vocab.*|.*\.model|merges\.txt|bpe\.codes")


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _from_folder_or_hub(name: str) -> tuple[Any, dict[str, str]]:
    """The backend of a transformers tokenizer and its special tokens."""
    # Imported here: it takes seconds, and the package's own tokenizer does not need it.
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any(map(_TOKENIZER_FILE.fullmatch, _names(folder))):
        # transformers would make an empty tokenizer of nothing but special tokens.
        raise ValueError(
            f"No tokenizer stands in the folder tokenizer={name!r}: it holds no tokenizer.json, "
            "vocabulary or sentencepiece model; save the tokenizer there, or name its own folder"
        )
    try:
        if not folder.exists():
            _require_hub(AutoTokenizer, name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"No tokenizer could be read from tokenizer={name!r}: give a folder with "
            f"tokenizer.json, such a file itself, or a hub name that can be reached ({reason})."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"The tokenizer {name!r} has no fast form (tokenizer.json); save one with transformers "
            "and name its folder as the tokenizer."
        )
    special = tokenizer.special_tokens_map
    return backend, {key: str(token) for key, token in special.items() if key.endswith("_token")}
