"""Imports run one way, and special libraries stay in the one module that is allowed them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "cwcl_jax"

_LIBRARY = {
    "losses", "models", "modalities", "data", "weights", "pretrained", "evaluation", "config",
    "training", "precision", "compiling",
}  # fmt: skip
_BELOW_MODALITIES = {f"data.{name}" for name in ("audio", "cuts", "draws", "skipping", "installed")}
# What each part, a folder or a module beside them, may import of the package besides itself.
ALLOWED = {
    "paths": set(),
    "files": {"paths"},
    "copies": {"files", "paths", "progress"},
    "progress": set(),
    "extension": set(),
    "packages": set(),
    "compiling": set(),
    "conversion": {"extension"},
    "early": set(),
    "precision": set(),
    "losses": {"extension", "precision"},
    "weights": {"files", "paths", "copies", "packages", "data.installed"},
    "models": {"extension", "precision", "weights"},
    # A modality stands on the functions that sources share; the pipeline stands on modalities.
    "modalities": {
        "extension", "packages", "synthetic", "paths", "copies", "weights.sentence_folder",
        *_BELOW_MODALITIES,
    },
    # What the package makes itself stands on hashes of integers alone.
    "synthetic": {"data.draws", "packages"},
    "data": {
        "files", "paths", "copies", "packages", "progress", "modalities", "extension", "synthetic",
    },
    "pretrained": {"models", "modalities", "weights", "files", "paths", "copies", "extension"},
    "evaluation": {"losses", "data", "modalities", "files", "paths", "copies", "extension"},
    "config": {
        "losses", "models", "modalities", "data", "evaluation", "extension", "precision",
        "training.options", "conversion",
    },
    "exit_codes": {"config", "early", "packages", "data.skipping"},
    "cli": {"config", "conversion", "exit_codes"},
    "training": {
        "losses", "models", "modalities", "data", "weights", "pretrained", "evaluation", "config",
        "exit_codes", "files", "paths", "copies", "extension", "progress", "planning.chips",
        "planning.work", "compiling",
    },
    "recipes": {"config", "losses"},
    "api": _LIBRARY | {"files", "paths", "copies"},
    "planning": _LIBRARY,
    "checking": _LIBRARY | {"benchmarks", "planning", "cli"},
    "benchmarks": _LIBRARY | {"synthetic", "cli", "planning", "recipes", "reproduction", "files"},
    "reproduction": _LIBRARY | {"cli", "files", "paths", "copies"},
}  # fmt: skip
# Entry files, which nothing imports: they may import everything.
ENTRIES = {
    "train", "evaluate", "embed", "export", "plan", "reproduce", "speak", "compare_torch",
    "check",
}  # fmt: skip
# Library -> the modules that may import it.
OWNERS = {
    "orbax": {"training.checkpoint", "training.stores"},
    "torch": {"losses.torch_reference", "weights.readers", "benchmarks.torch_towers"},
    "ml_collections": {"config", "cli"},
}
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path):
    module = module_name(path)
    part = module.split(".")[0]
    if module == "training.options":
        assert not internal_imports(path)
    for name in internal_imports(path):
        top = name.split(".")[0]
        if not module:
            assert top in ("api", "losses"), f"the package imports {name}"
            continue
        assert top not in ENTRIES, f"{module} imports the entry file {name}"
        if part in ENTRIES:
            continue
        assert top == part or top in ALLOWED[part] or name in ALLOWED[part], (
            f"{module} imports cwcl_jax.{name}"
        )


def test_every_part_is_known():
    parts = {module_name(path).split(".")[0] for path in FILES} - {""}
    assert parts == ALLOWED.keys() | ENTRIES


def internal_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, without the prefix `cwcl_jax.`."""
    result = set()
    for name in imported_names(path):
        if not name.startswith("cwcl_jax."):
            continue
        inner = name.removeprefix("cwcl_jax.")
        is_module = (ROOT / inner.replace(".", "/")).with_suffix(".py").exists()
        is_package = (ROOT / inner.replace(".", "/") / "__init__.py").exists()
        if is_module or is_package:
            result.add(inner)
    # `from cwcl_jax.training.options import X` names the module, not the package around it.
    return {name for name in result if not any(other.startswith(name + ".") for other in result)}


@pytest.mark.parametrize("library", OWNERS)
def test_library_has_one_owner(library):
    users = {
        module_name(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imported_names(path))
    }
    assert users <= OWNERS[library]
