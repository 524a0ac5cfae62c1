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

from cwcl_jax.copies import local_copy
from cwcl_jax.data.cuts import tell_cut
from cwcl_jax.data.installed import inside_package
from cwcl_jax.paths import is_url, to_path
from cwcl_jax.synthetic.captions import TOKENIZER_FILE

_SETTINGS = "tokenizer_config.json"
# Usual names of the special tokens, for files that do not name them.
_USUAL = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "bos_token": ("[BOS]", "[CLS]", "<s>"),
    "eos_token": ("[EOS]", "[SEP]", "</s>"),
}
# The package's own tokenizer, made for captions of its own scenes.
_OWN = "scenes"
OUTSIDE_SCENES = "outside the words of the package's tokenizer for scenes, spelt in letters"
# File names that show that a folder holds a tokenizer.
_TOKENIZER_FILE = re.compile(r"tokenizer\.json|.*vocab.*|.*\.model|merges\.txt|bpe\.codes")
# Replacement for bytes that are invalid UTF-8, inserted by this package or earlier.
REPLACED = "\ufffd"
# A prompt of this name explicitly means no prompt.
NO_PROMPT = "none"


class TextTokenizer:
    """Tokenizes lists of captions; longer ones are truncated so that their end token stays."""

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
        """Builds it from a `tokenizers.Tokenizer` and the names of its special tokens."""
        self._fast = _with_small_letters(backend) if lower_case else backend
        self.prompt = prompt
        """Prepended to every text; `save` does not write it."""
        self.name = name
        self.is_own = name == _OWN
        self.max_tokens = max_tokens
        self.special_tokens = self._present(special)
        """Tokens of the vocabulary by name: "pad_token", "bos_token", "eos_token" and others."""
        self.pad_id = self._special_id("pad_token", default=0)
        self.bos_id = self._special_id("bos_token", default=None)
        self.eos_id = self._special_id("eos_token", default=None)
        self._fast.enable_truncation(max_tokens)
        # Padding sides of a saved file are ignored: towers expect padding on the right.
        self._fast.enable_padding(direction="right", pad_id=self.pad_id, length=max_tokens)

    def _present(self, special: Mapping[str, str]) -> dict[str, str]:
        """Returns the vocabulary's special tokens; unnamed ones get their usual names."""
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
        """Returns a hash that changes with the vocabulary, the rules, the length and the prompt."""
        text = self._fast.to_str() + str(self.max_tokens) + self.prompt
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(
        self, captions: Sequence[str]
    ) -> dict[str, Int32[np.ndarray, "b s"] | Bool[np.ndarray, "b s"]]:
        """Returns `tokens` and `mask` of the captions, padded on the right."""
        encoded = self._fast.encode_batch([self.prompt + text for text in captions])
        tell_cut(lambda: sum(_length(rest) for e in encoded for rest in e.overflowing))
        tokens = np.array([e.ids for e in encoded], np.int32).reshape(-1, self.max_tokens)
        mask = np.array([e.attention_mask for e in encoded], bool).reshape(-1, self.max_tokens)
        return {"tokens": tokens, "mask": mask}

    def lost(self, caption: str) -> tuple[str, ...]:
        """Returns remarks on what the tokens lose of a caption (see `Modality.lost`)."""
        encoded = self._fast.encode(self.prompt + caption)
        pieces = [encoded, *encoded.overflowing]
        remarks = [f"cut at max_tokens={self.max_tokens}"] if encoded.overflowing else []
        if REPLACED in caption:
            remarks.append("not UTF-8 in their file: letters are lost (U+FFFD)")
        unknown = self.special_tokens.get("unk_token", "")
        tokens = [token for piece in pieces for token in piece.tokens]
        # One piece after a word is an ending, such as a plural's.
        pairs = itertools.pairwise(tokens)
        spelt = any(one.startswith("##") and two.startswith("##") for one, two in pairs)
        if self.is_own and (spelt or unknown in tokens):
            remarks.append(OUTSIDE_SCENES)
        elif unknown in tokens and unknown not in caption:
            remarks.append(f"with words that the tokenizer does not know ({unknown})")
        return tuple(remarks)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`, and a file with the names of special tokens.

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
    """Returns the number of tokens without padding and special ones."""
    return sum(encoded.attention_mask) - sum(
        special and used
        for special, used in zip(encoded.special_tokens_mask, encoded.attention_mask, strict=True)
    )


def _with_small_letters(backend: Any) -> Any:
    """Returns a backend that converts text to lower case first."""
    from tokenizers import normalizers

    steps = [normalizers.Lowercase()]
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def load_tokenizer(inputs: Any) -> TextTokenizer:
    """Returns the tokenizer that the options name.

    This is the package's own, or one from a folder, a file or the hub.
    """
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
    if is_url(name):
        name = str(_from_store(name))
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


def _from_store(name: str) -> Path:
    try:
        return local_copy(to_path(name))
    except OSError as error:
        raise ValueError(f"tokenizer={name!r}: {error}") from error


def _inside_package(spec: str) -> Path:
    try:
        return inside_package(spec)
    except FileNotFoundError as error:
        raise ValueError(f"tokenizer='installed:{spec}': {error}") from error


def _from_file(name: str) -> tuple[Any, dict[str, str]]:
    """Returns the backend of a tokenizer.json, and the special tokens of its settings."""
    from tokenizers import Tokenizer

    settings = Path(name).with_name(_SETTINGS)
    try:
        backend = Tokenizer.from_file(name)
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    except Exception as error:  # the library raises no narrower one
        raise ValueError(
            f"tokenizer={name!r} (with {_SETTINGS} next to it) cannot be read: {error}"
        ) from error
    # A token is written with its flags, or alone.
    tokens = {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in named.items()
        if key.endswith("_token")
    }
    return backend, {key: token for key, token in tokens.items() if isinstance(token, str)}


def _require_hub(kind: Any, name: str) -> None:
    """Raises OSError if a name is neither a folder nor cached, and the hub is unreachable.

    The hub's library would otherwise retry each file several times, for about a minute in total.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError("there is no such folder")
    try:
        kind.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(hub, timeout=5).close()
        except urllib.error.HTTPError:  # the hub answers
            return
        except OSError as error:
            raise OSError(f"there is no such folder, and {hub} cannot be reached") from error


def _from_folder_or_hub(name: str) -> tuple[Any, dict[str, str]]:
    """Returns the backend of a transformers tokenizer and its special tokens."""
    # Without PyTorch it advises to install it, which only its models need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Imported here: it takes seconds, and the package's own tokenizer does not need it.
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any(
        map(_TOKENIZER_FILE.fullmatch, (path.name for path in folder.iterdir()))
    ):
        # transformers would create an empty tokenizer that has only special tokens.
        raise ValueError(
            f"The folder tokenizer={name!r} has no tokenizer: it holds no tokenizer.json, "
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
