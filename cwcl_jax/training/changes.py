"""Differences between two starts of a run: settings or data, by dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cwcl_jax.config import to_plain


class _Missing:
    def __repr__(self) -> str:
        return "not there"


MISSING = _Missing()


def changed_fields(old: Any, new: Any, path: str = "config") -> dict[str, tuple[Any, Any]]:
    """Returns dotted path -> (old, new) of the settings in which two experiments differ.

    Args:
      old, new: experiments, or parts of them. A setting that one of them lacks is `MISSING` there.
    """
    old, new = to_plain(old), to_plain(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        changed: dict[str, tuple[Any, Any]] = {}
        for key in sorted(set(old) | set(new)):
            changed |= changed_fields(old.get(key, MISSING), new.get(key, MISSING), f"{path}.{key}")
        return changed
    old, new = (tuple(v) if isinstance(v, list) else v for v in (old, new))
    return {} if old == new else {path: (old, new)}


def tell_changes(changed: Mapping[str, tuple[Any, Any]], count: int = 4) -> str:
    """Returns the first changes as text: path, the old value and the new one."""
    told = [
        f"{path}: {_short(old)} then, {_short(new)} now"
        for path, (old, new) in list(changed.items())[:count]
    ]
    more = [f"and {len(changed) - count} more"] if len(changed) > count else []
    return "; ".join([*told, *more])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}"
