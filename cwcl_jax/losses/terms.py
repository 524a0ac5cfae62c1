"""Further terms of the loss that need no N x N array; the equations are in `presets`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwcl_jax.losses.numerics import wide


def of_pairs(
    names: tuple[str, ...], u: Float[Array, "n d"], v: Float[Array, "n d"]
) -> dict[str, Array]:
    """Returns the values of those terms among `names` that depend on u and v alone."""
    dtype = wide(u)
    u, v = u.astype(dtype), v.astype(dtype)
    values = {}
    if "cyclic_within" in names or "cyclic_across" in names:
        within, across = cyclic(u, v)
        both = {"cyclic_within": within, "cyclic_across": across}
        values |= {name: x for name, x in both.items() if name in names}
    # The locked embeddings are the target of the regression, so they get no gradient.
    locked = jax.lax.stop_gradient(u)
    if "cosine" in names:
        values["cosine"] = (1 - (locked * v).sum(axis=1)).mean()
    if "squared" in names:
        values["squared"] = jnp.square(locked - v).sum(axis=1).mean()
    return values


def cyclic(
    u: Float[Array, "n d"], v: Float[Array, "n d"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns CyCLIP's consistency within and across modalities, by three products of d x d.

    With A = u + v and B = u - v,

        u u^T - v v^T = (A B^T + B A^T) / 2,    u v^T - v u^T = (B A^T - A B^T) / 2

    so their squared norms are (<A^T A, B^T B> + <C, C^T>) / 2 and (<A^T A, B^T B> - <C, C^T>) / 2
    with C = B^T A. Where u and v are close, no large numbers cancel.
    """
    n = u.shape[0]
    a, b = u + v, u - v

    def product(x, y):
        return jnp.einsum("nd,ne->de", x, y, precision="highest")

    cross = product(b, a)
    squares = (product(a, a) * product(b, b)).sum()
    mixed = (cross * cross.T).sum()
    return (squares + mixed) / (2 * n), (squares - mixed) / (2 * n)
