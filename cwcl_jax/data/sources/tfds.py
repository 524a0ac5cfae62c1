"""TFDS through `tfds.data_source`, which needs no TensorFlow if the files are array_record."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.data.audio import as_int16
from cwcl_jax.data.sources.base import Example, Source, fingerprint_of

_RATE = 16_000
_FIELDS = ("image", "text", "audio", "label")


class TfdsSource(Source):
    """One split of a prepared TFDS data set; `keys` maps fields to feature names (`a/b` nests)."""

    def __init__(self, data: Any, keys: dict[str, str], *, name: str, rate: int, classes: Any):
        self._data = data
        self._keys = keys
        self._name = name
        self._rate = rate
        self._classes = classes

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._classes

    @property
    def lacks(self) -> Mapping[str, str]:
        missing = [field for field in _FIELDS if field not in self._keys]
        return {field: f"has no {field}; name its feature with {field}=" for field in missing}

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int, fields: Collection[str]) -> Example:
        record = self._data[index]
        example: Example = {"id": f"{self._name}/{index}"}
        for field, key in self._keys.items():
            if field not in fields:
                continue
            value = _nested(record, key)
            if field == "text":
                example[field] = as_strings(value)
            elif field == "label":
                example[field] = int(value)
            elif field == "audio" and isinstance(value, np.ndarray):
                example[field] = (as_int16(value), self._rate)
            else:
                example[field] = value
        return example

    def fingerprint(self) -> str:
        return fingerprint_of("tfds", self._name, len(self), sorted(self._keys.items()))


def as_strings(value: Any) -> str | list[str]:
    """Returns the text of a record: bytes, a string, or a sequence of either."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value
    return [text for item in value for text in [as_strings(item)] if isinstance(text, str)]


def _nested(record: Any, key: str) -> Any:
    """Returns the value at a path; for a list of records, the list of their values."""
    for part in key.split("/"):
        if isinstance(record, list | tuple):
            record = [item[part] for item in record]
        else:
            record = record[part]
    return record


def open_tfds(
    path: str,
    *,
    split: str = "train",
    data_dir: str = "",
    image: str = "",
    text: str = "",
    audio: str = "",
    label: str = "",
    rate: int = 0,
) -> TfdsSource:
    """Opens `tfds:coco?split=train&data_dir=/data`, or a prepared folder `tfds:/data/x/1.0.0`.

    The data must be prepared with `file_format='array_record'`. Features that are not named are
    found by their type: the first image, text and class label. `rate` is the sampling rate of audio
    stored as samples; 0 = the feature's own, or 16 kHz if it has none.
    """
    import tensorflow_datasets as tfds

    builder = _builder_without_tensorflow(tfds, path, data_dir)
    features: Any = builder.info.features
    keys = _keys(tfds, features, image=image, text=text, audio=audio, label=label)
    decoders = {}
    if "image" in keys and "/" not in keys["image"]:
        # Encoded bytes are passed on: decoding here would damage palette and CMYK pictures.
        decoders = {keys["image"]: tfds.decode.SkipDecoding()}
    data = builder.as_data_source(split=split, decoders=decoders)
    names = getattr(dict(features).get(keys.get("label", "")), "names", None)
    classes = list(names) if names else None
    name = f"{builder.info.full_name}/{split}"
    rate = rate or getattr(dict(features).get(keys.get("audio", "")), "sample_rate", None) or _RATE
    return TfdsSource(data, keys, name=name, rate=rate, classes=classes)


def _builder_without_tensorflow(tfds: Any, path: str, data_dir: str) -> Any:
    try:
        return _builder(tfds, path, data_dir)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"A feature of the TFDS data set {path!r} needs the package {error.name!r} (Audio and "
            "Video need tensorflow, whatever the file format): install it, or prepare audio as "
            "Tensor(shape=(None,), dtype=np.int16, encoding='bytes'), which needs nothing."
        ) from error


def _builder(tfds: Any, path: str, data_dir: str) -> Any:
    if Path(path).expanduser().is_dir():
        return tfds.builder_from_directory(Path(path).expanduser())
    kwargs = {"data_dir": data_dir} if data_dir else {}
    try:
        builder = tfds.builder(path, **kwargs)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"TFDS knows no data set {path!r} in data_dir={data_dir or 'its default'!r}; name a "
            "prepared folder (the one with dataset_info.json) or prepare it with "
            "file_format='array_record'."
        ) from error
    if not Path(builder.data_path).exists():
        raise FileNotFoundError(
            f"The TFDS data set {path!r} is not prepared in {builder.data_path}; run its "
            "download_and_prepare with file_format='array_record' first."
        )
    return builder


def _keys(tfds: Any, features: Any, **asked: str) -> dict[str, str]:
    keys = {field: name for field, name in asked.items() if name}
    kinds = {
        "image": tfds.features.Image,
        "text": tfds.features.Text,
        "label": tfds.features.ClassLabel,
    }
    for field, kind in kinds.items():
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        if field not in keys and found:
            keys[field] = found[0]
    for field, name in keys.items():
        if name.split("/")[0] not in features:
            raise ValueError(
                f"{field}={name!r} is not a feature of this data set; it has {', '.join(features)}."
            )
    if not keys:
        raise ValueError(f"No usable feature among {', '.join(features)}; name them by field=.")
    return keys
