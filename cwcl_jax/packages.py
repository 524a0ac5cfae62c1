"""Optional packages, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackage(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def import_package(name: str, extra: str, what: str) -> Any:
    """Returns the module `name`.

    Args:
      extra: the extra of cwcl_jax that installs it.
      what: what needs it, for the message.

    Raises:
      MissingPackage: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(
            f"{what} needs the package {name!r}: pip install 'cwcl_jax[{extra}]'"
        ) from error
