"""Import of foreign checkpoints: readers of files and rules that map their names."""

from cwcl_jax.pretrained.augreg_npz import write_augreg_npz
from cwcl_jax.pretrained.folder_config import complete
from cwcl_jax.pretrained.importer import ImportedTower, import_tower
from cwcl_jax.weights.failures import WeightsMismatch

__all__ = ["ImportedTower", "WeightsMismatch", "complete", "import_tower", "write_augreg_npz"]
