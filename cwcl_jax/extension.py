"""What a config names as `"module:Name"`: a class or a function of the user's, imported."""

import importlib
from typing import Any


def import_named(reference: str, what: str) -> Any:
    """Returns what `reference` names.

    Args:
      reference: "module:Name"; the module is one that Python finds from the working folder, on
        PYTHONPATH or among the installed packages.
      what: it is to be, for messages, for example "evaluation task".

    Raises:
      ValueError: `reference` has no colon, or names a module or an attribute that is not there.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise ValueError(f"{what} {reference!r} is not of the form 'module:Name'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} {reference!r}: Python finds no module {error.name!r}; start where it lies, or "
            "put its folder on PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"{what} {reference!r}: the module {module_name} has no {name!r}")
    return getattr(module, name)
