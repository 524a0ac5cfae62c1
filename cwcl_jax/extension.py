"""What a person wrote outside of the package, named in a config as "module:name"."""

import importlib
from typing import Any


def import_named(reference: str, what: str) -> Any:
    """Imports the object that `reference`, "module:name", names.

    Args:
      reference: an importable module and an attribute of it.
      what: what is wanted, for the message: "a loss", "a weight function".

    Raises:
      ValueError: there is no colon, no such module, or no such attribute in it.
    """
    module, colon, name = reference.partition(":")
    if not (colon and module and name):
        raise ValueError(f"{reference!r} does not name {what}; write 'module:name'.")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # the module is there; what it imports is not
        raise ValueError(
            f"{reference!r} ({what}): there is no module {module!r} on the Python path."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{reference!r} ({what}): {module!r} has no {name!r}.")
        found = getattr(found, part)
    return found
