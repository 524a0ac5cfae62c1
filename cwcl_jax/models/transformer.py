"""The transformer core of every encoder: one block, a stack of blocks, and how a stack is run.

Vaswani et al. 2017, arXiv 1706.03762. `norm_order="pre"` is x + f(norm(x)) (ViT, Whisper, CLIP),
`"post"` is norm(x + f(x)) (BERT, BART). The families differ only in GELU, epsilon and biases.

A stack is either unrolled (`blocks/0/...`, `blocks/1/...`) or scanned: one block whose leaves have
a leading layer axis (`blocks/attention/query/kernel` of shape (layers, d, d)), whose compile time
does not grow with the depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from cwcl_jax.models.attention import attend
from cwcl_jax.models.layers import ADAPTED, Embed, LayerNorm, Linear
from cwcl_jax.models.numerics import activate, dropout


def _fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns whether a primitive is cuDNN's forward kernel.

    It is a product under a name that JAX's own policies do not know.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


_either = jax.checkpoint_policies.save_from_both_policies
_others = _either(jax.checkpoint_policies.save_only_these_names(ADAPTED), _fused_attention)
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,  # keep only a block's input
    "dots": _either(jax.checkpoint_policies.dots_saveable, _others),
    "dots_no_batch": _either(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _others),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How an encoder is run, as opposed to what it computes."""

    dtype: DTypeLike = jnp.float32
    """Compute dtype; parameters stay in `param_dtype`, softmax and norms in float32."""
    param_dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: str = "auto"
    """What a block keeps for the backward pass: "none" leaves it to the compiler; "dots" keeps the
    results of products and recomputes elementwise operations; "dots_no_batch" does not keep
    attention scores either; "full" keeps only the input. "auto" is "dots" on a GPU, where XLA by
    itself keeps GELUs and norms in float32 (2.3 times the memory), else "none": XLA for TPUs does
    as well by itself, and on CPUs it costs 5 % of the time and saves nothing (README.md).
    """
    attention: str = "auto"
    """"xla", "cudnn", or "auto": cuDNN's fused kernel where the device and the types allow it."""

    def __post_init__(self) -> None:
        if self.remat not in ("auto", "none", *REMAT_POLICIES):
            known = ", ".join(["auto", "none", *REMAT_POLICIES])
            raise ValueError(f"unknown remat policy {self.remat!r}; choose one of {known}")
        if self.attention not in ("auto", "xla", "cudnn"):
            raise ValueError(f"unknown attention {self.attention!r}; choose auto, xla or cudnn")
        # Canonical dtypes, so that two equal settings have equal hashes.
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))

    @property
    def policy(self) -> str:
        """The value of `remat` with "auto" resolved."""
        if self.remat == "auto":
            return "dots" if jax.default_backend() == "gpu" else "none"
        return self.remat


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The settings of a stack of blocks."""

    depth: int
    width: int
    heads: int
    mlp_width: int
    norm_order: str
    activation: str
    epsilon: float
    dropout: float = 0.0
    query_value_bias: bool = True
    key_bias: bool = True
    causal: bool = False

    def __post_init__(self) -> None:
        if self.norm_order not in ("pre", "post"):
            raise ValueError(f"norm_order is 'pre' or 'post', not {self.norm_order!r}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @classmethod
    def of(
        cls,
        settings: Any,
        *,
        norm_order: str,
        query_value_bias: bool = True,
        key_bias: bool = True,
        causal: bool = False,
    ) -> Any:
        """Returns the stack of an encoder whose settings have the same field names."""
        return cls(
            depth=settings.depth,
            width=settings.width,
            heads=settings.heads,
            mlp_width=settings.mlp_width,
            norm_order=norm_order,
            activation=settings.activation,
            epsilon=settings.epsilon,
            dropout=settings.dropout,
            query_value_bias=query_value_bias,
            key_bias=key_bias,
            causal=causal,
        )


def linear(
    fan_in: int, fan_out: int, execution: Execution, rngs: nnx.Rngs, *, bias: bool = True
) -> Linear:
    """Returns a dense layer with the package's initialisation and dtypes."""
    return Linear(
        fan_in,
        fan_out,
        use_bias=bias,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        kernel_init=nnx.initializers.xavier_uniform(),
        rngs=rngs,
    )


def layer_norm(width: int, epsilon: float, execution: Execution, rngs: nnx.Rngs) -> LayerNorm:
    """Returns a LayerNorm with two-pass variance; the fast form is off by 4e-4 for large means."""
    return LayerNorm(
        width,
        narrow=jnp.dtype(execution.dtype),
        epsilon=epsilon,
        use_fast_variance=False,
        param_dtype=execution.param_dtype,
        rngs=rngs,
    )


def embedding(count: int, width: int, execution: Execution, rngs: nnx.Rngs) -> Embed:
    """Returns a table of `count` vectors with standard deviation 0.02; its rows are float32."""
    return Embed(
        count,
        width,
        dtype=jnp.float32,
        param_dtype=execution.param_dtype,
        embedding_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Multi-head self-attention. `mask` is True where a key is real."""

    def __init__(self, config: TransformerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        width, bias = config.width, config.query_value_bias
        self.query = linear(width, width, execution, rngs, bias=bias)
        self.key = linear(width, width, execution, rngs, bias=config.key_bias)
        self.value = linear(width, width, execution, rngs, bias=bias)
        self.out = linear(width, width, execution, rngs)
        self.heads = config.heads
        self.causal = config.causal
        self.implementation = execution.attention

    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"] | None
    ) -> Float[Array, "b s d"]:
        b, s, d = x.shape
        head_dim = d // self.heads

        def split_heads(y: Float[Array, "b s d"]) -> Float[Array, "b s h k"]:
            return y.reshape(b, s, self.heads, head_dim)

        mixed = attend(
            split_heads(self.query(x)),
            split_heads(self.key(x)),
            split_heads(self.value(x)),
            mask,
            causal=self.causal,
            implementation=self.implementation,
        )
        return self.out(mixed.reshape(b, s, d))


class Mlp(nnx.Module):
    """Two dense layers around an activation."""

    def __init__(self, config: TransformerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.up = linear(config.width, config.mlp_width, execution, rngs)
        self.down = linear(config.mlp_width, config.width, execution, rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.down(activate(self.up(x), self.activation))


class GatedMlp(nnx.Module):
    """Computes down(activation(gate(x)) * up(x)): Shazeer 2020, arXiv 2002.05202."""

    def __init__(
        self,
        config: TransformerConfig,
        execution: Execution,
        *,
        bias: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        width, inner = config.width, config.mlp_width
        self.gate = linear(width, inner, execution, rngs, bias=bias)
        self.up = linear(width, inner, execution, rngs, bias=bias)
        self.down = linear(inner, width, execution, rngs, bias=bias)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.down(activate(self.gate(x), self.activation) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each with a residual connection and a norm.

    A subclass may read something else instead of `mask` (see `apply_blocks`).
    """

    def __init__(self, config: TransformerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, execution, rngs=rngs)
        self.norm1 = layer_norm(config.width, config.epsilon, execution, rngs)
        self.mlp = Mlp(config, execution, rngs=rngs)
        self.norm2 = layer_norm(config.width, config.epsilon, execution, rngs)
        self.pre_norm = config.norm_order == "pre"
        self.dropout = config.dropout

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Any,
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        keys = (None, None) if key is None else jax.random.split(key, 2)
        drop = functools.partial(dropout, rate=self.dropout)
        if self.pre_norm:
            x = x + drop(self.attention(self.norm1(x), mask), key=keys[0])
            return x + drop(self.mlp(self.norm2(x)), key=keys[1])
        x = self.norm1(x + drop(self.attention(x, mask), key=keys[0]))
        return self.norm2(x + drop(self.mlp(x), key=keys[1]))


def make_blocks(
    config: TransformerConfig,
    execution: Execution,
    *,
    rngs: nnx.Rngs,
    kind: type[Block] = Block,
) -> nnx.Pytree:
    """Returns the blocks of a stack: a list, or with `scan_layers` one block with a layer axis."""
    if not execution.scan_layers:
        return nnx.List([kind(config, execution, rngs=rngs) for _ in range(config.depth)])

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap
    def stacked(layer_rngs: nnx.Rngs) -> Block:
        return kind(config, execution, rngs=layer_rngs)

    return stacked(rngs)


def apply_blocks(
    blocks: nnx.Pytree,
    x: Float[Array, "b s d"],
    mask: Any,
    *,
    config: TransformerConfig,
    execution: Execution,
    key: jax.Array | None = None,
) -> Float[Array, "b s d"]:
    """Returns the output of the blocks of `make_blocks`; without a key there is no dropout.

    `execution` determines the rematerialisation.

    Args:
      mask: bool (b, s), True where a key is real, or None; a custom kind of block may read
          something else instead.
    """
    keys = None if key is None else jax.random.split(key, config.depth)
    if isinstance(blocks, Block):
        graphdef, state = nnx.split(blocks)
        run = _rematerialised(graphdef, mask, execution.policy)

        def body(carry: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, None]:
            layer_state, layer_key = layer
            return run(layer_state, carry, layer_key), None

        return jax.lax.scan(body, x, (state, keys))[0]
    for i, block in enumerate(blocks):  # type: ignore[arg-type]
        block_key = None if keys is None else keys[i]
        if execution.policy == "none":
            x = block(x, mask, block_key)
        else:
            graphdef, state = nnx.split(block)
            x = _rematerialised(graphdef, mask, execution.policy)(state, x, block_key)
    return x


def _rematerialised(
    graphdef: nnx.GraphDef[Block], mask: Any, remat: str
) -> Callable[[Any, jax.Array, jax.Array | None], jax.Array]:
    """Returns a block as a pure function of (state, x, key), under the named remat policy."""

    def run(state: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return nnx.merge(graphdef, state)(x, mask, key)

    if remat == "none":
        return run
    return jax.checkpoint(run, policy=REMAT_POLICIES[remat])
