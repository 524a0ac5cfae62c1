"""The import of ViT-L/16 holds nothing twice: run by hand with -m slow (1.2 GB of disk)."""

import subprocess
import sys

import numpy as np
import pytest

from cwcl_jax.models.vit import PRESETS
from cwcl_jax.pretrained import write_augreg_npz
from tests.pretrained.test_augreg import below, model

SCRIPT = """
import sys
import jax
from cwcl_jax.pretrained import import_tower
from tests.pretrained.test_augreg import model

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

config, _, abstract = model(
    abstract=True, preset="ViT-L/16", overrides={}, head="linear", weights=sys.argv[1]
)
jax.numpy.zeros(3).block_until_ready()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the high-water mark
before = kilobytes("VmRSS")
leaves = import_tower(config, "image", abstract).leaves
jax.block_until_ready(leaves)
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
def test_vit_l16_is_imported_within_1_3_times_its_file(tmp_path):
    path = tmp_path / "L_16.npz"
    _, _, abstract = model(abstract=True, preset="ViT-L/16", overrides={})
    rng = np.random.default_rng(0)
    leaves = {p: rng.standard_normal(x.shape, np.float32) for p, x in below(abstract).items()}
    write_augreg_npz(path, PRESETS["ViT-L/16"], leaves)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert int(done.stdout) <= 1.3 * path.stat().st_size
