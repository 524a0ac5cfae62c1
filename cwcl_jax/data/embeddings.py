"""Embeddings made once by a locked tower, read back beside (or instead of) the raw examples."""

from collections.abc import Mapping

from cwcl_jax.data.sources.base import Source


def with_embeddings(source: Source, folders: Mapping[str, str]) -> Source:
    """The source with the vectors of `folders` (modality -> folder) added to its examples."""
    if not folders:
        return source
    raise NotImplementedError("data.embeddings")
