"""Measures what the digests of a checkpoint cost beside the save itself: run by hand.

    python -m tests.drill_digests --megabytes=800

Prints seconds of the processor, which do not depend on how busy the machine is: of the digests
alone, of a whole save that is waited for (digests included), and the one's share of the other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cwcl_jax.training.checkpoint import Checkpoints, _checkpointables, _leaves
from cwcl_jax.training.digest import digests
from cwcl_jax.training.options import CheckpointConfig
from cwcl_jax.training.state import TrainState

# Shapes of a transformer's block, by the width.
_BLOCK = ((1, 1), (1, 3), (1, 4), (4, 1))


def state_of(megabytes: int, width: int = 768) -> TrainState:
    """Blocks of matrices and vectors, and of Adam's two averages as many."""
    rng, leaves, size = np.random.default_rng(0), {}, 0
    while size < megabytes * 1e6 / 3:
        for rows, columns in (*_BLOCK, (0, 4), (0, 1)):
            shape = (rows * width, columns * width) if rows else (columns * width,)
            leaves[f"leaf{len(leaves)}"] = jnp.asarray(rng.random(shape, np.float32))
            size += 4 * int(np.prod(shape))
    opt_state = {name: jax.tree.map(jnp.copy, leaves) for name in ("mu", "nu")}
    return TrainState(step=jnp.zeros((), jnp.int32), params=leaves, opt_state=opt_state)


def main() -> None:
    """Measures in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to save; by default the system's temporary folder")
    arguments = parser.parse_args()
    state = jax.block_until_ready(state_of(arguments.megabytes))
    leaves = _leaves(_checkpointables(state))
    digests(leaves)  # compiled
    alone, whole = [], []
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
        Checkpoints(Path(folder, "checkpoints"), CheckpointConfig(keep=1)) as checkpoints,
    ):
        for step in range(1, arguments.rounds + 1):
            begin = time.process_time()
            digests(leaves)
            alone.append(time.process_time() - begin)
            begin = time.process_time()
            checkpoints.save(step, state, {})
            checkpoints.wait()
            whole.append(time.process_time() - begin)
    one, all_ = statistics.median(alone), statistics.median(whole)
    size = sum(leaf.nbytes for leaf in leaves.values()) / 1e9
    print(f"{len(leaves)} leaves, {size:.2f} GB; seconds of the processor, median of {len(whole)}")
    print(f"digests {one:.3f}, save {all_:.2f} with them: {one / all_:.1%}")
    print("digests", [round(x, 3) for x in alone], "saves", [round(x, 2) for x in whole])


if __name__ == "__main__":
    main()
