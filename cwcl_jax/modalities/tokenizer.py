"""The tokenizer of texts: token ids of one fixed length, with an attention mask."""

import hashlib
import itertools
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from cwcl_jax.data.cuts import tell_cut
from cwcl_jax.data.installed import inside_package
from cwcl_jax.synthetic.captions import TOKENIZER_FILE

_SETTINGS = "tokenizer_config.json"
# What the special tokens are called where a file does not say so.
_USUAL = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "bos_token": ("[BOS]", "[CLS]", "<s>"),
    "eos_token": ("[EOS]", "[SEP]", "</s>"),
}
# The package's own tokenizer, made for captions of its own scenes.
_OWN = "scenes"
OUTSIDE_SCENES = "outside the words of the package's tokenizer for scenes, spelt in letters"
# What shows that a folder holds a tokenizer.
_TOKENIZER_FILE = re.compile(r"tokenizer\.json|.*vocab.*|.*\.model|merges\.txt|bpe\.codes")
# What stands for bytes that no UTF-8 can be, in this package's reading or an earlier one.
REPLACED = "\ufffd"
# A prompt of this name is none, on purpose.
NO_PROMPT = "none"


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
        if REPLACED in caption:
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


def load_tokenizer(inputs: Any) -> TextTokenizer:
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
        prompt="" if inputs.prompt == NO_PROMPT else inputs.prompt,
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
        kind.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(hub, timeout=5).close()
        except urllib.error.HTTPError:  # it answers
            return
        except OSError as error:
            raise OSError(f"there is no such folder, and {hub} cannot be reached") from error


def _from_folder_or_hub(name: str) -> tuple[Any, dict[str, str]]:
    """The backend of a transformers tokenizer and its special tokens."""
    # Imported here: it takes seconds, and the package's own tokenizer does not need it.
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any(
        map(_TOKENIZER_FILE.fullmatch, (path.name for path in folder.iterdir()))
    ):
        # transformers would make an empty tokenizer of nothing but special tokens.
        raise ValueError(
            f"No tokenizer stands in the folder tokenizer={name!r}: it holds no tokenizer.json, "
            "vocabulary or sentencepiece model; save the tokenizer there, or name its own folder"
        )
    try:
        if not folder.exists():
            _require_hub(AutoTokenizer, name)
        # Left out, transformers would ask the person at the terminal.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The tokenizer {name!r} brings code of its own (auto_map), which is never run: "
                "save it as a tokenizer.json, and name that file."
            ) from error
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
