"""The one way in which a setting names something of the user's: `"module:name"`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from typing import Any


def is_reference(name: str) -> bool:
    """Whether a setting names something outside of the package, as `"module:name"`."""
    return ":" in name


def import_named(reference: str, what: str) -> Any:
    """Imports what `"module:name"` names.

    Args:
      reference: a module that Python can import, a colon, and the name of something in it.
      what: what the caller looks for, such as "encoder", for error messages.

    Raises:
      ValueError: the reference has no colon, the module cannot be imported, or has no such name.
    """
    module_name, colon, name = reference.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"{what} {reference!r} must have the form 'module:name'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{what} {reference!r}: the module {module_name!r} imports {error.name!r}, which "
                "is not installed"
            ) from error
        raise ValueError(
            f"{what} {reference!r}: there is no module {error.name!r}; start Python in the folder "
            "that holds it, or add that folder to PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{what} {reference!r}: importing {module_name!r} failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"{what} {reference!r}: the module {module_name!r} has no {name!r}")
    return getattr(module, name)


def source_hash(thing: Any) -> str:
    """Returns a hash of the source of a class or function; "" where there is none to read."""
    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]
