"""Reads folders of sentence-transformers: modules, pooling, dense layers, prompts.

`modules.json` lists the modules that a text passes through: a Transformer (whose files a tower's
encoder reads), Pooling, Dense layers, Normalize. Modules that a tower does not have are refused by
name. The processing of text before tokenization is stored in `sentence_bert_config.json` and
`config_sentence_transformers.json`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cwcl_jax.files import parse_json
from cwcl_jax.weights.readers import Entry, Weights, open_weights

MODULES = "modules.json"
TEXT_SETTINGS = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
_TOKENIZER = "tokenizer_config.json"
# Their pooling -> ours; older files write it as pooling_mode_NAME = true.
POOLINGS = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "max": "max",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "last",
}
_ACTIVATIONS = {
    "Identity": "identity",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "SiLU": "silu",
    "GELU": "gelu_erf",
    "ReLU": "relu",
}
# In this order. A final Normalize changes nothing, because embeddings have unit norm.
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
# Active in training only.
_NOTHING = ("Dropout",)
# What a Dense layer may read and write: the vector of the whole text.
_EMBEDDING = (None, "sentence_embedding")


@dataclasses.dataclass(frozen=True)
class SentenceFolder:
    """The settings of a sentence-transformers folder, apart from its encoder.

    Attributes:
      root: folder of the whole model.
      pooling: this package's name of the pooling; "" if no file names one.
      pooling_file: the file that names the pooling.
      dense: the dense layers, in the notation of `models.dense`.
      dense_folders: folders of their weights.
    """

    root: Path
    pooling: str = ""
    pooling_file: Path = Path()
    dense: str = ""
    dense_folders: tuple[Path, ...] = ()


def root_of(folder: Path) -> Path:
    """Returns the model's folder: older models keep the encoder in a subfolder of it."""
    above = folder.parent / MODULES
    inside = not (folder / MODULES).exists() and above.exists()
    if inside and any(m.get("path") == folder.name for m in _modules(above)):
        return folder.parent
    return folder


def encoder_folder(folder: Path) -> Path:
    """Returns the folder of the encoder's own files, given the folder of a whole model."""
    file = folder / MODULES
    for module in _modules(file) if file.exists() else []:
        if _kind(module) == "Transformer" and module.get("path"):
            return folder / str(module["path"])
    return folder


def read_sentence_folder(folder: Path, *, pooling_is_chosen: bool = False) -> SentenceFolder:
    """Returns the settings around an encoder; empty ones for another kind of folder.

    Args:
      folder: folder of the whole model, or of its encoder.
      pooling_is_chosen: whether the tower sets its own pooling, so that an unsupported pooling of
          the folder is not an error.

    Raises:
      ValueError: a module, setting or order that a tower does not have; the message names it.
    """
    root = root_of(folder)
    file = root / MODULES
    if not file.exists():
        file = root / "1_Pooling" / "config.json"
        return _with_pooling(SentenceFolder(root), file, pooling_is_chosen)
    found = SentenceFolder(root)
    place = 0
    layers: list[str] = []
    for module in _modules(file):
        kind = _kind(module)
        path = root / str(module.get("path", ""))
        if kind in _NOTHING:
            continue
        if kind not in _ORDER:
            raise ValueError(
                f"{file}: its vectors also pass through {module.get('path') or kind} "
                f"({module.get('type')}), and a tower does not: for the model without it, copy the "
                f"folder without {MODULES}"
            )
        if _ORDER.index(kind) < place or (kind != "Dense" and _ORDER.index(kind) == place > 0):
            raise ValueError(
                f"{file}: {kind} ({module.get('path')}) is in a place where a tower has none: the "
                f"known order is {', '.join(_ORDER)}"
            )
        place = _ORDER.index(kind)
        if kind == "Pooling":
            found = _with_pooling(found, path / "config.json", pooling_is_chosen)
        if kind == "Dense":
            layers.append(_dense(path / "config.json"))
            found = dataclasses.replace(found, dense_folders=(*found.dense_folders, path))
    return dataclasses.replace(found, dense=",".join(layers))


def _modules(file: Path) -> list[Mapping[str, Any]]:
    content = parse_json(file.read_bytes())
    if not isinstance(content, list) or not all(isinstance(m, Mapping) for m in content):
        raise ValueError(f"{file} does not hold a list of modules; fetch it again")
    return content


def _kind(module: Mapping[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _settings(file: Path) -> Mapping[str, Any]:
    content = parse_json(file.read_bytes()) if file.exists() else {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: is not a JSON object: fetch it again")
    return content


def _with_pooling(found: SentenceFolder, file: Path, lenient: bool) -> SentenceFolder:
    content = _settings(file)
    if content.get("include_prompt") is False:
        raise ValueError(
            f"{file}: include_prompt=false leaves the prompt's tokens out of the pooling, which "
            "is not supported"
        )
    modes = content.get("pooling_mode") or [
        name.removeprefix("pooling_mode_")
        for name, chosen in content.items()
        if name.startswith("pooling_mode_") and chosen is True
    ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) > 1 or not set(modes) <= POOLINGS.keys():
        if lenient:
            return found
        raise ValueError(
            f"{file}: pooling by {' and '.join(map(str, modes))} is not supported: set the tower's "
            "pooling to cls or mean"
        )
    if not modes and content:
        modes = ["mean"]  # the default of sentence-transformers
    pooling = POOLINGS[modes[0]] if modes else ""
    return dataclasses.replace(found, pooling=pooling, pooling_file=file)


def _dense(file: Path) -> str:
    """Returns a Dense module's settings, in the notation of `models.dense`."""
    content = _settings(file)
    places = content.get("module_input_name"), content.get("module_output_name")
    if content.get("use_residual") or not set(places) <= set(_EMBEDDING):
        raise ValueError(
            f"{file}: a residual, or an input other than the sentence embedding, is not supported"
        )
    theirs = str(content.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _ACTIVATIONS.get(theirs.rpartition(".")[2])
    if activation is None or not theirs.startswith("torch."):
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{file}: activation {theirs!r} is not supported; known are {known}")
    width = content.get("out_features")
    if not isinstance(width, int):
        raise ValueError(f"{file}: out_features is {width!r}: expected a number")
    return f"{width}:{activation}" + ("" if content.get("bias", True) else ":no_bias")


class WithDense:
    """A view of an encoder's file together with the arrays of dense layers."""

    def __init__(self, weights: Weights, folders: Sequence[Path]) -> None:
        self.source = weights.source
        self._weights = weights
        self._places: dict[str, tuple[Weights, str]] = {}
        self.entries = dict(weights.entries)
        for number, folder in enumerate(folders):
            opened = open_weights(folder)
            for name, entry in opened.entries.items():
                ours = f"dense/{number}/{name.replace('.', '/')}"
                kernel = ours.endswith("/linear/weight")
                ours = ours.removesuffix("weight") + "kernel" if kernel else ours
                shape = entry.shape[::-1] if kernel else entry.shape
                self.entries[ours] = Entry(shape, entry.dtype)
                self._places[ours] = (opened, name)

    def read(self, name: str) -> Any:
        """Returns the array; kernels as (in, out)."""
        if name not in self._places:
            return self._weights.read(name)
        opened, theirs = self._places[name]
        array = opened.read(theirs)
        return array.T if name.endswith("/kernel") else array


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What a folder does to texts before they are tokenized.

    Attributes:
      max_tokens: the length at which it truncates, or None.
      lower_case: whether it converts texts to lower case.
      prompt: its default prefix of every text; "" for none.
      prompt_name: name of that prompt.
      prompts: all its prompts, by name.
    """

    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""
    prompt_name: str = ""
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_text_settings(folder: Path) -> TextSettings:
    """Returns the text settings of a folder; defaults for a folder of another kind.

    Raises:
      ValueError: the default prompt is not among the folder's prompts, or the encoder processes
          texts in a way that a tower does not.
    """
    root = root_of(folder)
    inside = encoder_folder(root)
    transformer = {**_settings(root / TEXT_SETTINGS), **_settings(inside / TEXT_SETTINGS)}
    _check_way(root / TEXT_SETTINGS, transformer)
    content = _settings(root / PROMPTS)
    prompts = {name: text for name, text in (content.get("prompts") or {}).items() if text}
    chosen = content.get("default_prompt_name")
    if chosen and chosen not in (content.get("prompts") or {}):
        raise ValueError(
            f"{root / PROMPTS}: default_prompt_name {chosen!r} is not one of its prompts: "
            f"{', '.join(prompts) or 'none'}"
        )
    longest = transformer.get("max_seq_length")
    if longest is None and (root / MODULES).exists():
        # Newer files leave it to the tokenizer, which uses a huge number for "no limit".
        tokenizer = {**_settings(root / _TOKENIZER), **_settings(inside / _TOKENIZER)}
        limit = tokenizer.get("model_max_length")
        longest = limit if isinstance(limit, int) and limit < 1_000_000 else None
    return TextSettings(
        max_tokens=longest if isinstance(longest, int) else None,
        lower_case=bool(transformer.get("do_lower_case")),
        prompt=prompts.get(chosen, "") if chosen else "",
        prompt_name=chosen or "",
        prompts=prompts,
    )


def _check_way(file: Path, content: Mapping[str, Any]) -> None:
    """Raises ValueError if the encoder's result is not the token outputs of its last layer."""
    method = (content.get("modality_config") or {}).get("text") or {}
    other = {
        name: value
        for name, value, usual in (
            ("transformer_task", content.get("transformer_task"), "feature-extraction"),
            ("method_output_name", method.get("method_output_name"), "last_hidden_state"),
            ("processing_kwargs", content.get("processing_kwargs") or None, None),
        )
        if value is not None and value != usual
    }
    if other:
        named = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise ValueError(f"{file}: {named} is not supported")
