"""The equations, dense and line by line: the definition that every other form is tested against.

CWCL (Srinivasa et al., NeurIPS 2023, arXiv 2309.14580), N pairs, s = 1/tau = exp(logit_scale):

    w_ij        = <p_i, p_j> / 2 + 1/2
    L(U->V)     = -1/N sum_i (1 / sum_j w_ij) sum_j w_ij log softmax_j(s <u_i, v_j>)
    L(V->U)     = -1/N sum_j log softmax_i(s <u_i, v_j>) at i = j
    L           = L(U->V) + L(V->U)

p are the embeds of the locked tower; u equals p unless that tower has a trained head. Rows of p, u
and v have unit norm. Any float type; arrays of N x N; both differentiation modes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""] | float


def dot(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """All inner products of rows, accumulated in float32 or better."""
    return jnp.einsum("nd,md->nm", a, b, precision="highest", preferred_element_type=wide(a))


def wide(x: Array) -> jnp.dtype:
    """The type sums are kept in: float64 for float64, float32 for everything narrower."""
    return jnp.promote_types(x.dtype, jnp.float32)


def pair_logits(
    u: Float[Array, "n d"], v: Float[Array, "n d"], logit_scale: Scalar
) -> Float[Array, "n n"]:
    """s <u_i, v_j>."""
    return jnp.exp(jnp.asarray(logit_scale, wide(u))) * dot(u, v)


def similarity_weights(p: Float[Array, "n k"]) -> Float[Array, "n n"]:
    """The paper's weights, <p_i, p_j> / 2 + 1/2, in [0, 1] for rows of unit norm."""
    return dot(p, p) / 2 + 0.5


def soft_targets(weights: Float[Array, "n n"], epsilon: float = 0.0) -> Float[Array, "n n"]:
    """Weights divided by their row sums."""
    return weights / (weights.sum(axis=1, keepdims=True) + epsilon)


def soft_cross_entropy(
    logits: Float[Array, "n n"], targets: Float[Array, "n n"]
) -> Float[Array, ""]:
    """-1/N sum_ij t_ij log softmax_j(logits_ij)."""
    log_probabilities = jax.nn.log_softmax(logits, axis=1)
    # A target of zero may stand beside a logit of -inf (a masked pair).
    terms = jnp.where(targets == 0, 0.0, targets * jnp.where(targets == 0, 0.0, log_probabilities))
    return -terms.sum(axis=1).mean()


def cwcl(
    u: Float[Array, "n d"], v: Float[Array, "n d"], p: Float[Array, "n k"], logit_scale: Scalar
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The paper's two terms, L_CWCL(U->V) and L_CL(V->U); their sum is the loss."""
    logits = pair_logits(u, v, logit_scale)
    targets = soft_targets(similarity_weights(jax.lax.stop_gradient(p)))
    own_pair = jnp.eye(len(u), dtype=logits.dtype)
    return (
        soft_cross_entropy(logits, targets.astype(logits.dtype)),
        soft_cross_entropy(logits.T, own_pair),
    )


def contrastive(
    u: Float[Array, "n d"], v: Float[Array, "n d"], logit_scale: Scalar
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """InfoNCE in both directions, L_CL(U->V) and L_CL(V->U)."""
    logits = pair_logits(u, v, logit_scale)
    own_pair = jnp.eye(len(u), dtype=logits.dtype)
    return soft_cross_entropy(logits, own_pair), soft_cross_entropy(logits.T, own_pair)


def weighted(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    logit_scale: Scalar,
    *,
    weights: Float[Array, "n n"],
    weighted_directions: str = "u_to_v",
    epsilon: float = 0.0,
    masked: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """L(U->V) and L(V->U) for any weights.

    Weight (i, j) belongs to the pair (u_i, v_j): rows are normalised for U->V, columns for V->U.
    The direction that `weighted_directions` does not name has its own pair as the only target.
    `masked` pairs are left out of both softmaxes.
    """
    logits = pair_logits(u, v, logit_scale)
    if masked is not None:
        logits = jnp.where(masked, -jnp.inf, logits)
        weights = jnp.where(masked, 0, weights)
    own_pair = jnp.eye(len(u), dtype=logits.dtype)
    weights = weights.astype(logits.dtype)
    rows = soft_targets(weights, epsilon) if weighted_directions != "v_to_u" else own_pair
    columns = soft_targets(weights.T, epsilon) if weighted_directions != "u_to_v" else own_pair
    return soft_cross_entropy(logits, rows), soft_cross_entropy(logits.T, columns)


def sigmoid(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    logit_scale: Scalar,
    logit_bias: Scalar,
    positives: Array | None = None,
    masked: Array | None = None,
) -> Float[Array, ""]:
    """-1/N sum_ij log sigmoid(z_ij (s <u_i, v_j> + bias)), z = 1 for positives, else -1.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343).
    """
    logits = pair_logits(u, v, logit_scale) + logit_bias
    if positives is None:
        positives = jnp.eye(len(u), dtype=bool)
    signs = jnp.where(positives, 1, -1).astype(logits.dtype)
    terms = jax.nn.log_sigmoid(signs * logits)
    if masked is not None:
        terms = jnp.where(masked, 0, terms)
    return -terms.sum(axis=1).mean()
