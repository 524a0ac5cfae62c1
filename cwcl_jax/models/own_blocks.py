"""Stacks of blocks that are not all alike, or that see more than a mask of keys.

The blocks of `models.transformer` are equal and know one mask. A family whose blocks differ by
layer (local and global attention) or share a table of biases brings blocks of its own, and runs
them with `run_blocks`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cwcl_jax.models.transformer import REMAT_POLICIES, Execution


def refuse_scan(family: str, execution: Execution) -> None:
    """Raises ValueError where layers are to be scanned, which takes equal ones."""
    if execution.scan_layers:
        raise ValueError(f"the layers of {family} cannot be scanned: set scan_layers=False for it")


def run_blocks(
    blocks: Sequence[nnx.Module],
    x: Float[Array, "b s d"],
    *context: Any,
    execution: Execution,
    key: jax.Array | None = None,
) -> Float[Array, "b s d"]:
    """Calls each block as `block(x, *context, key)`, rematerialised as `execution` says."""
    keys = [None] * len(blocks) if key is None else list(jax.random.split(key, len(blocks)))
    policy = execution.policy
    for block, block_key in zip(blocks, keys, strict=True):
        if policy == "none":
            x = block(x, *context, block_key)  # type: ignore[operator]
            continue
        graphdef, state = nnx.split(block)

        def run(state: Any, x: jax.Array, context: Any, key: Any, graphdef: Any = graphdef) -> Any:
            return nnx.merge(graphdef, state)(x, *context, key)

        x = jax.checkpoint(run, policy=REMAT_POLICIES[policy])(state, x, context, block_key)
    return x


def attend_pairs(
    query: Float[Array, "b s h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    mask: Bool[Array, "b s"],
    *,
    bias: Float[Array, "1 h s s"] | None = None,
    window: int = 0,
) -> Float[Array, "b s h k"]:
    """Self-attention with a bias for each pair of places, or within a window; XLA's kernel.

    Args:
      mask: True where a key is real.
      bias: added to the scores, in their scale.
      window: how far a token sees on either side; 0 sees everything.
    """
    places = jnp.arange(query.shape[1])
    near = jnp.abs(places[:, None] - places[None, :]) <= window if window else None
    seen = mask[:, None, None, :]
    seen = seen if near is None else seen & near[None, None]
    # A row without any key to look at would be NaN; it may look at everything, pooling drops it.
    seen = seen | ~jnp.any(seen, axis=-1, keepdims=True)
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=seen, implementation="xla"
    )
