"""Import of external checkpoints: readers of files and rules that map their names."""

from cwcl_jax.pretrained.augreg_npz import write_augreg_npz
from cwcl_jax.pretrained.folder_config import PAIRS, complete
from cwcl_jax.pretrained.importer import (
    ImportedTower,
    PlannedImport,
    folder_of,
    import_tower,
    logits_of,
    planned_import,
)
from cwcl_jax.weights.failures import WeightsMismatch

__all__ = [
    "PAIRS",
    "ImportedTower",
    "PlannedImport",
    "WeightsMismatch",
    "complete",
    "folder_of",
    "import_tower",
    "logits_of",
    "planned_import",
    "write_augreg_npz",
]
