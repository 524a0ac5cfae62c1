"""Captions to token ids of one fixed length, with an attention mask."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from cwcl_jax.data.captions import TOKENIZER_FILE
from cwcl_jax.data.installed import inside_package
from cwcl_jax.data.options import TextInputs

_SETTINGS = "tokenizer_config.json"
# What the special tokens are called where a file does not say so.
_USUAL = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "bos_token": ("[BOS]", "[CLS]", "<s>"),
    "eos_token": ("[EOS]", "[SEP]", "</s>"),
}


class TextTokenizer:
    """Tokenizes lists of captions; longer ones are cut so that their end token stays."""

    def __init__(self, backend: Any, special: Mapping[str, str], *, max_tokens: int, name: str):
        """Build from a `tokenizers.Tokenizer` and the names of its special tokens."""
        self._fast = backend
        self.name = name
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
        text = self._fast.to_str() + str(self.max_tokens)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(
        self, captions: Sequence[str]
    ) -> dict[str, Int32[np.ndarray, "b s"] | Bool[np.ndarray, "b s"]]:
        """`tokens` and `mask` of the captions, padded on the right."""
        encoded = self._fast.encode_batch(list(captions))
        tokens = np.array([e.ids for e in encoded], np.int32).reshape(-1, self.max_tokens)
        mask = np.array([e.attention_mask for e in encoded], bool).reshape(-1, self.max_tokens)
        return {"tokens": tokens, "mask": mask}

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
            **self.special_tokens,
        }
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (folder / _SETTINGS).write_text(text, encoding="utf-8")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fast": self._fast.to_str()}

    def __setstate__(self, state: dict) -> None:
        from tokenizers import Tokenizer

        self.__dict__.update(state, _fast=Tokenizer.from_str(state["_fast"]))


def load_tokenizer(inputs: TextInputs) -> TextTokenizer:
    """The tokenizer that the options name: the package's own, a folder, a file, or a hub name."""
    # Batches are small and several threads read: the library's own threads would only add load.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if inputs.max_tokens < 3:
        raise ValueError(
            f"data.text.max_tokens={inputs.max_tokens} leaves no room for a word between the "
            "begin and end tokens; use 3 or more."
        )
    name = inputs.tokenizer or str(TOKENIZER_FILE)
    if name.startswith("installed:"):
        name = str(_inside_package(name.removeprefix("installed:")))
    backend, special = _from_file(name) if Path(name).is_file() else _from_folder_or_hub(name)
    shown = inputs.tokenizer or "scenes"
    return TextTokenizer(backend, special, max_tokens=inputs.max_tokens, name=shown)


def _inside_package(spec: str) -> Path:
    try:
        return inside_package(spec)
    except FileNotFoundError as error:
        raise ValueError(f"data.text.tokenizer='installed:{spec}': {error}") from error


def _from_file(name: str) -> tuple[Any, dict[str, str]]:
    """The backend of a tokenizer.json, and its special tokens as the settings beside it say."""
    from tokenizers import Tokenizer

    settings = Path(name).with_name(_SETTINGS)
    try:
        backend = Tokenizer.from_file(name)
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    except Exception as error:  # the library raises no narrower one
        raise ValueError(
            f"data.text.tokenizer={name!r} (with {_SETTINGS} beside it) cannot be read: {error}"
        ) from error
    # A token is written with its flags, or alone.
    tokens = {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in named.items()
        if key.endswith("_token")
    }
    return backend, {key: token for key, token in tokens.items() if isinstance(token, str)}


def _from_folder_or_hub(name: str) -> tuple[Any, dict[str, str]]:
    """The backend of a transformers tokenizer and its special tokens."""
    # Imported here: it takes seconds, and the package's own tokenizer does not need it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer could be read from data.text.tokenizer={name!r}: give a folder with "
            f"tokenizer.json, such a file itself, or a hub name that can be reached ({error})."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"The tokenizer {name!r} has no fast form (tokenizer.json); save one with transformers "
            "and name its folder in data.text.tokenizer."
        )
    special = tokenizer.special_tokens_map
    return backend, {key: str(token) for key, token in special.items() if key.endswith("_token")}


def tokenize(
    captions: Sequence[str], inputs: TextInputs
) -> dict[str, Int32[np.ndarray, "b s"] | Bool[np.ndarray, "b s"]]:
    """Tokens and mask of a few captions; load the tokenizer once for many."""
    return load_tokenizer(inputs)(captions)
