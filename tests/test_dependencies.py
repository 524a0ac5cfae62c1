"""What the code imports, pyproject.toml declares: a fresh environment lacks everything else."""

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cwcl_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = importlib.metadata.packages_distributions()
OWN = {"cwcl_jax", "tests", "configs", "launch"}
# Peers and exporters that one command names when they are missing; each would bring much.
BY_HAND = {"jax2onnx", "webdataset"}


def brought(requirements: list[str]) -> set[str]:
    """The distributions that an installation of these requirements brings, with all of theirs."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if name in found:
            continue
        found.add(name)
        try:
            further = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        for one in map(Requirement, further):
            if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(one)
    return found


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, at its top or inside a function."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
    return {name.partition(".")[0] for name in names}


def undeclared(folder: str, requirements: list[str]) -> dict[str, list[str]]:
    """Modules that no requirement brings, with the files that import them."""
    known = brought(requirements)
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        # Files beside the importing one are imported by their bare names.
        beside = {p.stem for p in path.parent.glob("*.py")} | OWN | BY_HAND
        for module in imported(path) - beside - set(sys.stdlib_module_names):
            distributions = {canonicalize_name(d) for d in MODULES.get(module, [module])}
            if not distributions & known:
                found.setdefault(module, []).append(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("tests", ["test"]), ("cwcl_jax", list(EXTRAS)), ("configs", []), ("launch", [])],
)
def test_every_import_is_declared(folder, extras):
    requirements = PROJECT["dependencies"] + [one for name in extras for one in EXTRAS[name]]
    assert undeclared(folder, requirements) == {}


def test_the_package_tells_its_version():
    assert cwcl_jax.__version__ == PROJECT["version"]
