"""Data sets that Hugging Face's `datasets` saved on disk: `hf:/data/flowers?split=train`.

They are read by pyarrow alone: `save_to_disk` writes a folder of Arrow streams, which can be
memory-mapped, and two JSON files.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cwcl_jax.copies import local_copy
from cwcl_jax.data.sources.base import Source
from cwcl_jax.data.sources.named import ColumnOptions
from cwcl_jax.files import parse_json
from cwcl_jax.paths import to_path

if TYPE_CHECKING:
    import pyarrow as pa

    from cwcl_jax.data.sources.arrow_files import ArrowFiles


def open_saved(
    path: str,
    *,
    split: str = "",
    named: ColumnOptions,
    root: str = "",
) -> Source:
    """Opens a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Args:
      split: split of a DatasetDict; not needed if there is only one.
      named: what each column is used for.
      root: folder that paths in the rows are relative to; by default the data set's own.
    """
    from cwcl_jax.data.sources.arrow_columns import choose_columns
    from cwcl_jax.data.sources.arrow_rows import ArrowRows

    folder = _split_folder(local_copy(to_path(path)), split)
    store = SavedRows(folder)
    columns = choose_columns(store.schema, named, f"hf:{folder}")
    return ArrowRows(store, columns, to_path(root) if root else folder)


def _split_folder(folder: Path, split: str) -> Path:
    """Returns the folder of one data set, i.e. of the split if there are several.

    Raises:
      FileNotFoundError: `save_to_disk` did not write the folder.
      ValueError: the split does not exist, or several do and none is chosen.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"hf:{folder} is not a folder. It must be one that datasets.load_dataset(...)"
            ".save_to_disk(FOLDER) wrote; names of the hub are not downloaded."
        )
    listing = folder / "dataset_dict.json"
    if listing.exists():
        splits = [str(name) for name in _read_object(listing).get("splits") or ()]
        if not split and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            said = f"has no split {split!r}" if split else "has several splits"
            raise ValueError(f"hf:{folder} {said}; choose with split=: {', '.join(splits)}.")
        if Path(split).name != split:
            raise ValueError(
                f"The split {split!r} of {listing} is not the name of a folder next to it."
            )
        return folder / split
    if not (folder / "state.json").exists():
        raise FileNotFoundError(
            f"hf:{folder} has neither dataset_dict.json nor state.json, so save_to_disk did not "
            "write it. For a folder of .parquet files write parquet:FOLDER."
        )
    if split and split != _read_object(folder / "state.json").get("_split"):
        raise ValueError(f"hf:{folder} is one data set without splits; leave split={split!r} out.")
    return folder


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}. Save the data set again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object. Save the data set again.")
    return value


class SavedRows:
    """The rows of one saved data set, in its order, which may be stored as an index."""

    def __init__(self, folder: Path):
        from cwcl_jax.data.sources.arrow_files import ArrowFiles

        self.folder = folder
        state = _read_object(folder / "state.json")
        self._identity = state.get("_fingerprint")
        self._files = ArrowFiles(_listed_files(folder, state.get("_data_files")))
        self._indices = self._read_indices(state)
        self.schema = _with_features(self._files.schema, _read_object(folder / "dataset_info.json"))

    def _read_indices(self, state: Mapping[str, Any]) -> "ArrowFiles | None":
        """Returns the row numbers of a stored order, as older releases write it, or None."""
        from cwcl_jax.data.sources.arrow_files import ArrowFiles

        listed = state.get("_indices_data_files") or state.get("_indices_files")
        if not listed:
            return None
        indices = ArrowFiles(_listed_files(self.folder, listed))
        largest = max((int(part.to_numpy().max()) for part in indices.column("indices")), default=0)
        if largest >= len(self._files):
            raise ValueError(
                f"The indices of hf:{self.folder} name row {largest} of {len(self._files)}. Save "
                "the data set again."
            )
        return indices

    def _row(self, index: int) -> int:
        if self._indices is None:
            return index
        return self._indices.cells(index, ["indices"])["indices"].as_py()

    def __len__(self) -> int:
        return len(self._files if self._indices is None else self._indices)

    def cells(self, index: int, tops: Sequence[str]) -> "Mapping[str, pa.Scalar]":
        return self._files.cells(self._row(index), tops)

    def name_of(self, index: int) -> str:
        return self._files.name_of(self._row(index))

    def column(self, top: str) -> "Iterator[pa.Array]":
        return self._files.column(top)

    def places(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self._row(int(index)) for index in indices], np.int64)

    def content(self) -> object:
        order = None if self._indices is None else self._indices.content()
        return self._identity, self._files.content(), order

    def __reduce__(self):
        return SavedRows, (self.folder,)


def _listed_files(folder: Path, listed: Any) -> list[Path]:
    """Returns the files that a state lists, all of which must be in the folder.

    Raises:
      ValueError: the list is empty, or a file is outside the folder.
      FileNotFoundError: a file is missing.
    """
    if listed == []:
        raise ValueError(f"The saved data set hf:{folder} has no examples.")
    names = [item.get("filename") for item in listed or () if isinstance(item, dict)]
    if not names:
        raise ValueError(f"The state.json of hf:{folder} lists no data files.")
    paths = [folder / str(name) for name in names]
    for path in paths:
        if path.parent.resolve() != folder.resolve():
            raise ValueError(f"The state.json of hf:{folder} names {path}, outside of the folder.")
        if not path.exists():
            raise FileNotFoundError(f"{path}, which state.json names, is missing: copy it again.")
    return paths


def _with_features(schema: "pa.Schema", info: Mapping[str, Any]) -> "pa.Schema":
    """Returns the schema with the features of dataset_info.json, which later casts update."""
    stored = json.dumps({"info": {"features": info.get("features")}}).encode()
    return schema.with_metadata({**(schema.metadata or {}), b"huggingface": stored})
