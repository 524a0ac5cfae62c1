"""How a setting names something in a user's code: `"module:name"`."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any


class CodeError(ValueError):
    """A setting names code that does not exist, or that cannot be imported."""


def is_reference(name: str) -> bool:
    """Returns whether a setting names something outside the package, as `"module:name"`."""
    return ":" in name


def import_named(reference: str, what: str) -> Any:
    """Imports and returns what `"module:name"` names.

    Args:
      reference: a module that Python can import, a colon, and the name of something in it.
      what: what the caller needs, such as "encoder", for error messages.

    Raises:
      CodeError: the reference has no colon, the module cannot be imported, or has no such name.
    """
    module_name, colon, name = reference.partition(":")
    if not (colon and module_name and name):
        raise CodeError(f"{what} {reference!r} must have the form 'module:name'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise CodeError(
                f"{what} {reference!r}: the module {module_name!r} imports {error.name!r}, which "
                "is not installed"
            ) from error
        raise CodeError(
            f"{what} {reference!r}: there is no module {error.name!r}; start Python in the folder "
            "that holds it, or add that folder to PYTHONPATH"
        ) from error
    except Exception as error:
        raise CodeError(
            f"{what} {reference!r}: importing {module_name!r} failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        raise CodeError(f"{what} {reference!r}: the module {module_name!r} has no {name!r}")
    return getattr(module, name)


def code_hash(reference: str) -> str:
    """Returns a hash of the code of what `"module:name"` names; "" if there is none to read.

    It covers what the name's definition uses of its own module, and the whole of modules that are
    imported from the same folder. Comments and layout do not count.
    """
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
        source = inspect.getsource(module)
    except Exception:  # a missing module is reported by the code that needs it
        return ""
    folder = Path(inspect.getfile(module)).parent
    dumps = []
    for node in _used(ast.parse(source), name):
        dumps.append(ast.dump(node))
        for beside in _imported_files(node, folder):
            dumps.append(ast.dump(ast.parse(beside.read_text(encoding="utf-8"))))
    return hashlib.sha256("\n".join(dumps).encode()).hexdigest()[:16]


def _used(tree: ast.Module, name: str) -> list[ast.stmt]:
    """Returns the statements of a module that a name's definition needs, in the module's order."""
    defining: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for defined in _defined(node):
            defining.setdefault(defined, []).append(node)
    found: set[int] = set()
    names, seen = [name], set()
    while names:
        current = names.pop()
        if current in seen:
            continue
        seen.add(current)
        for node in defining.get(current, ()):
            found.add(id(node))
            names += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return [node for node in tree.body if id(node) in found]


def _defined(node: ast.stmt) -> list[str]:
    """Returns the names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    return [
        part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    ]


def _imported_files(node: ast.stmt, folder: Path) -> list[Path]:
    """Returns the files in `folder` that an import statement reads."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module] if node.module else [alias.name for alias in node.names]
    else:
        return []
    files = [folder / f"{name.split('.')[-1]}.py" for name in names]
    return [file for file in files if file.is_file()]


def is_missing_code(error: BaseException | None) -> bool:
    """Returns whether an error is caused by a setting's code that cannot be imported."""
    while error is not None:
        if isinstance(error, CodeError):
            return True
        error = error.__cause__
    return False
