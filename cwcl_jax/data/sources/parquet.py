"""Parquet files, also with pictures or sound: `parquet:/data/train-*.parquet?text=caption`.

A row group is decoded as a whole. Random reads are therefore cheap only if all decoded data fits
into memory, or after `keep` has unpacked it once.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cwcl_jax.copies import disk_home
from cwcl_jax.data.sources.base import Source
from cwcl_jax.data.sources.files import expand_pattern, require
from cwcl_jax.data.sources.named import ColumnOptions
from cwcl_jax.files import matching
from cwcl_jax.paths import is_url, to_path

if TYPE_CHECKING:
    import pyarrow as pa

    from cwcl_jax.data.sources.arrow_columns import Columns

# Shards as the hub names them: train-00000-of-00003, followed by a hash in older ones.
_SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


def open_parquet(
    path: str,
    *,
    split: str = "",
    named: ColumnOptions,
    root: str = "",
    keep: str = "",
    memory_mib: int = 1024,
    cache_dir: str = "",
) -> Source:
    """Opens a file, a folder of files, or a pattern such as `/data/{00000..00031}.parquet`.

    Args:
      split: for a folder whose files are called SPLIT-00000-of-00003.parquet, the one to read.
      named: the uses of the columns.
      root: the folder that paths in the rows are relative to; by default the files' own.
      keep: a folder in which the columns are unpacked once, or "auto": one in the cache folder.
      memory_mib: decoded row groups that stay in memory, in MiB.
    """
    from cwcl_jax.data.sources.arrow_columns import choose_columns
    from cwcl_jax.data.sources.arrow_rows import ArrowRows
    from cwcl_jax.data.sources.row_groups import RowGroups
    from cwcl_jax.data.sources.unpacked import Unpacked

    if memory_mib < 1:
        raise ValueError(f"memory_mib={memory_mib} of parquet:{path} must be at least 1.")
    if is_url(keep):
        raise ValueError(f"keep={keep} of parquet:{path} must be a folder of this machine's disk.")
    paths = _find(path, split)
    store = RowGroups(paths, memory_mib)
    schemas = store.schemas()
    columns = choose_columns(schemas[0], named, f"parquet:{path}")
    _check_alike(paths, schemas, columns)
    folder = to_path(root) if root else _common_folder(paths)
    rows = ArrowRows(store, columns, folder)
    if not keep:
        return rows
    where = Path(keep) if keep != "auto" else disk_home(cache_dir) / "parquet"
    tops = columns.tops(columns.all_fields())
    return ArrowRows(Unpacked(store, tops, where / rows.fingerprint()), columns, folder)


def _common_folder(paths: Sequence[Path]) -> Path:
    if any(map(is_url, paths)):
        return paths[0].parent
    return Path(os.path.commonpath([file.absolute().parent for file in paths]))


def _find(path: str, split: str) -> list[Path]:
    if not to_path(path).is_dir():
        if split:
            raise ValueError(f"split={split!r} chooses files of a folder, but {path} is not one.")
        return [require(file, "The Parquet file") for file in expand_pattern(path)]
    files = matching(to_path(path), "*.parquet")
    if not files:
        inside = sorted({file.parent.name for file in matching(to_path(path), "*/*.parquet")})
        hint = f" Its folders {', '.join(inside)} do: name one." if inside else ""
        raise FileNotFoundError(f"The folder {path} holds no .parquet files.{hint}")
    found = {file: match for file in files if (match := _SPLIT.fullmatch(file.stem))}
    splits = sorted({match.group(1) for match in found.values()})
    if split and split not in splits:
        raise ValueError(
            f"The folder {path} has no files of split={split!r}; it has "
            f"{', '.join(splits) or 'no splits'}."
        )
    if len(splits) > 1 and not split:
        raise ValueError(
            f"The folder {path} holds the splits {', '.join(splits)}; choose one with split=."
        )
    return [file for file, match in found.items() if match.group(1) == split] if split else files


def _check_alike(paths: Sequence[Path], schemas: "Sequence[pa.Schema]", columns: "Columns") -> None:
    """Raises ValueError if the files disagree about a used column or about its classes."""
    import pyarrow.types as pat

    from cwcl_jax.data.sources.arrow_columns import plain_type, stored_features

    for top in columns.tops(columns.all_fields()):
        first = plain_type(schemas[0].field(top).type)
        names = stored_features(schemas[0]).get(top, {}).get("names")
        for path, schema in zip(paths, schemas, strict=True):
            here = plain_type(schema.field(top).type) if top in schema.names else None
            if here is None or not (here.equals(first) or pat.is_null(here) or pat.is_null(first)):
                raise ValueError(
                    f"The column {top!r} is {first} in {paths[0]} and "
                    f"{'missing' if here is None else here} in {path}; files of one source must "
                    "agree. Leave the file out, or write it again."
                )
            if stored_features(schema).get(top, {}).get("names") != names:
                raise ValueError(
                    f"The classes of {top!r} in {path} are not those in {paths[0]}; open the files "
                    "separately and mix them with '::'."
                )
