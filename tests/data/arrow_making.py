"""Folders and files of Arrow columns, as `datasets` and others write them, with pyarrow alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.making import jpeg

MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "caption": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["cat", "dog", "cow"], "_type": "ClassLabel"},
}


def table(count: int, first: int = 0, **columns: Any) -> pa.Table:
    """Pictures, captions and labels of some examples; `columns` come on top or instead."""
    numbers = range(first, first + count)
    pictures = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in numbers]
    made = {
        "image": pa.array(pictures, MEDIA),
        "caption": pa.array([f"caption {number}" for number in numbers]),
        "label": pa.array([number % 3 for number in numbers]),
    }
    return pa.table(made | columns)


def eeg(number: int) -> np.ndarray:
    """A recording of three channels, one for each example."""
    return np.random.default_rng(number).normal(size=(3, 5)).astype(np.float32)


def with_features(rows: pa.Table, features: Any = None) -> pa.Table:
    """The table with features in its metadata, as `datasets` stores them."""
    stored = {"info": {"features": FEATURES if features is None else features}}
    return rows.replace_schema_metadata({"huggingface": json.dumps(stored)})


def write_parquet(path: Path, rows: pa.Table, group: int = 4) -> None:
    """A Parquet file with row groups of a few rows."""
    pq.write_table(rows, path, row_group_size=group)


def write_stream(path: Path, rows: pa.Table, batch: int = 4) -> None:
    """A file of record batches of a few rows."""
    with pa.ipc.new_stream(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=batch)


def write_saved(
    folder: Path,
    parts: Sequence[pa.Table],
    features: Any = None,
    indices: Sequence[int] | None = None,
) -> None:
    """A folder as `Dataset.save_to_disk` makes it; with `indices` as old releases made it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        write_stream(folder / name, part)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f00"}
    if indices is not None:
        write_stream(folder / "indices.arrow", pa.table({"indices": pa.array(indices, "uint64")}))
        state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    info = {"features": FEATURES if features is None else features}
    (folder / "dataset_info.json").write_text(json.dumps(info))
