"""Vision transformer: Dosovitskiy et al. 2021, arXiv 2010.11929.

AugReg: Steiner et al. 2022, arXiv 2106.10270. Defaults are AugReg's: tanh GELU, epsilon 1e-6,
pixels (x - 127.5) / 127.5. The transformers library's ViT differs in two settings only: erf GELU
and epsilon 1e-12. CLIP's image tower (Radford et al. 2021, arXiv 2103.00020) has a norm before the
blocks, and patches without a bias.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from cwcl_jax.models import clip_layouts, open_clip
from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.layer_names import vit_rules
from cwcl_jax.models.layers import affine
from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.pooling import pool
from cwcl_jax.models.transformer import (
    Block,
    Execution,
    TransformerConfig,
    apply_blocks,
    layer_norm,
    make_blocks,
)
from cwcl_jax.weights.config_json import STACK, clip_part, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, unstacked, without_prefix


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes and numerics of a vision transformer."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    dropout: float = 0.0
    patch_dropout: float = 0.0
    """Share of the patches that a training step drops, drawn for every picture (FLIP, Li et al.
    2023, arXiv 2212.00794). The class token is kept; nothing is dropped in evaluation or in a
    locked encoder.
    """
    pooling: str = "cls"
    """"cls", or "mean" over the patches."""
    class_token: bool = True
    qkv_bias: bool = True
    patch_bias: bool = True
    embedding_norm: bool = False
    """A norm between the embeddings and the blocks, as in CLIP."""
    pixel_mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    pixel_std: tuple[float, float, float] = (127.5, 127.5, 127.5)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout {self.patch_dropout} is a share from 0 to below 1")
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"pooling of a ViT is 'cls' or 'mean', not {self.pooling!r}")
        if self.pooling == "cls" and not self.class_token:
            raise ValueError("pooling='cls' needs class_token=True; or choose pooling='mean'")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the sequence: the patches, and the class token if there is one."""
        return self.grid**2 + int(self.class_token)


# Width, depth, heads, MLP width. Ti, S: DeiT (arXiv 2012.12877) table 1, S as in AugReg table 2; B,
# L, H: arXiv 2010.11929 table 1.
_SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}

PRESETS: dict[str, VitConfig] = {
    f"ViT-{size}/{patch}": VitConfig(
        patch_size=patch, width=width, depth=depth, heads=heads, mlp_width=mlp_width
    )
    for size, (width, depth, heads, mlp_width) in _SIZES.items()
    for patch in (8, 14, 16, 32)
}
# CLIP's image towers (arXiv 2103.00020, table 20); mean and standard deviation of its training
# pictures.
PRESETS |= {
    f"CLIP-{name}": dataclasses.replace(
        PRESETS[name],
        activation="quick_gelu",
        epsilon=1e-5,
        patch_bias=False,
        embedding_norm=True,
        pixel_mean=(122.7709383, 116.7460125, 104.09373615),
        pixel_std=(68.5005327, 66.6321579, 70.32316305),
    )
    for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14")
}
# This package's own size for 64 x 64 pictures: 0.47 M parameters, 1.9 MB in float32.
PRESETS["tiny"] = VitConfig(image_size=64, patch_size=8, width=96, depth=4, heads=3, mlp_width=384)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches times one kernel: a strided convolution written as one matmul."""

    def __init__(self, config: VitConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        patch, width = config.patch_size, config.width
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        shape = (patch, patch, 3, width)
        self.kernel = nnx.Param(init(rngs.params(), shape, execution.param_dtype))
        if config.patch_bias:
            self.bias = nnx.Param(jnp.zeros((width,), execution.param_dtype))
        self.has_bias = config.patch_bias
        self.patch = patch
        self.dtype = execution.dtype

    def __call__(self, x: Float[Array, "b y x 3"]) -> Float[Array, "b s d"]:
        b, height, width, _ = x.shape
        p = self.patch
        rows, columns = height // p, width // p
        x = x[:, : rows * p, : columns * p]  # drops a border, which only SigLIP's family has
        x = x.reshape(b, rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, rows * columns, p * p * 3).astype(self.dtype)
        kernel = self.kernel[...].reshape(p * p * 3, -1)
        return affine(x, kernel, self.bias[...] if self.has_bias else None)


def drop_patches(
    x: Float[Array, "b s d"], share: float, key: jax.Array, *, first: int
) -> Float[Array, "b t d"]:
    """Returns the `first` tokens and a random part of the others, without a `share` of these.

    At least one is kept. The draw depends on the key and the example's position in the batch.
    """
    patches = x.shape[1] - first
    count = max(1, round(patches * (1 - share)))
    _, chosen = jax.lax.top_k(jax.random.uniform(key, (x.shape[0], patches)), count)
    kept = jnp.take_along_axis(x, first + chosen[:, :, None], axis=1)
    return jnp.concatenate([x[:, :first], kept], axis=1)


class Vit(nnx.Module):
    """Encoder of images {"pixels": uint8 (b, y, x, 3)}; it normalises the pixels' range itself.

    Attributes:
      block: the kind of its blocks.
      adds_positions: whether a learned table of positions is added to the tokens.
    """

    block: ClassVar[type[Block]] = Block
    adds_positions: ClassVar[bool] = True

    def __init__(self, config: VitConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.execution = execution
        width, dtype = config.width, execution.param_dtype
        normal = nnx.initializers.normal(0.02)
        self.patch_embed = PatchEmbed(config, execution, rngs=rngs)
        if config.class_token:
            self.class_token = nnx.Param(jnp.zeros((1, 1, width), dtype))
        if self.adds_positions:
            shape = (1, config.tokens, width)
            self.position_embedding = nnx.Param(normal(rngs.params(), shape, dtype))
        if config.embedding_norm:
            self.embedding_norm = layer_norm(width, config.epsilon, execution, rngs)
        self.blocks = make_blocks(self.stack(), execution, rngs=rngs, kind=self.block)
        self.norm = layer_norm(width, config.epsilon, execution, rngs)

    @property
    def feature_width(self) -> int:
        """Width of a feature vector."""
        return self.config.width

    def stack(self) -> TransformerConfig:
        """Returns the settings of the blocks."""
        config = self.config
        return TransformerConfig.of(
            config, norm_order="pre", query_value_bias=config.qkv_bias, key_bias=config.qkv_bias
        )

    def embed(
        self, pixels: UInt8[Array, "b y x 3"], key: jax.Array | None = None
    ) -> Float[Array, "b t d"]:
        """Returns patches and class token with positions added, normalised if the family does so.

        With a key and `patch_dropout`, only some of the patches are returned.
        """
        side = self.config.image_size
        if pixels.shape[1:3] != (side, side):
            raise ValueError(
                f"pixels are {pixels.shape[1]}x{pixels.shape[2]}, the ViT expects {side}x{side}: "
                f"set the data's image size, or overrides image_size={pixels.shape[1]}, which "
                "resamples an imported position grid"
            )
        mean = jnp.asarray(self.config.pixel_mean, jnp.float32)[None, None, None, :]
        std = jnp.asarray(self.config.pixel_std, jnp.float32)[None, None, None, :]
        # Sums and broadcasts are in float32, so that gradients over the batch are summed in it too.
        x = self.patch_embed((pixels.astype(jnp.float32) - mean) / std).astype(jnp.float32)
        if self.config.class_token:
            token = self.class_token[...].astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2])), x], axis=1)
        if self.adds_positions:
            x = x + self.position_embedding[...].astype(x.dtype)
        if key is not None and self.config.patch_dropout:
            # A separate key: `dropout` below uses the key itself.
            own = jax.random.fold_in(key, 1)
            x = drop_patches(x, self.config.patch_dropout, own, first=int(self.config.class_token))
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        return dropout(x.astype(self.execution.dtype), self.config.dropout, key)

    def tokens(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Returns the sequence after the final norm."""
        keys = (None, None) if key is None else jax.random.split(key, 2)
        x = apply_blocks(
            self.blocks,
            self.embed(inputs["pixels"], keys[0]),
            None,
            config=self.stack(),
            execution=self.execution,
            key=keys[1],
        )
        return self.norm(x)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        tokens = self.tokens(inputs, key)
        if self.config.pooling == "mean":
            tokens = tokens[:, int(self.config.class_token) :]
        return pool(tokens, None, self.config.pooling)


# Names in AugReg and big_vision `.npz` files, and in transformers' ViT files. big_vision renamed
# its modules once (`MultiHeadDotProductAttention_1` to `..._0`, `MlpBlock_3` to `..._0`,
# `LayerNorm_2` to `..._1`) and can store all layers in one array; both forms are supported.
_B = r"Transformer/encoderblock_(\d+)"
_ATTENTION = rf"{_B}/MultiHeadDotProductAttention_[01]"
_OURS = r"encoder/blocks/\1"


def _augreg_view(weights: Weights) -> Weights:
    """Returns a view without prefixes of train states and two-tower models, one array per layer."""
    plain = without_prefix(weights, r"(?:opt/target/|params/)?(?:img/)?")
    return unstacked(plain, r"(Transformer/encoderblock)(/.+)")


AUGREG = Layout(
    name="AugReg/big_vision ViT",
    signature=r"(.*/)?Transformer/encoder_norm/scale",
    view=_augreg_view,
    rules=[
        Rule(r"cls", "encoder/class_token"),
        Rule(r"embedding/(kernel|bias)", r"encoder/patch_embed/\1"),
        Rule(
            r"(?:Transformer/posembed_input/)?pos_embedding", "encoder/position_embedding", "grid"
        ),
        Rule(rf"{_B}/LayerNorm_0/(scale|bias)", rf"{_OURS}/norm1/\2"),
        Rule(rf"{_B}/LayerNorm_[12]/(scale|bias)", rf"{_OURS}/norm2/\2"),
        Rule(
            rf"{_ATTENTION}/(query|key|value)/kernel", rf"{_OURS}/attention/\2/kernel", "join_last"
        ),
        Rule(rf"{_ATTENTION}/(query|key|value)/bias", rf"{_OURS}/attention/\2/bias", "join_first"),
        Rule(rf"{_ATTENTION}/out/kernel", rf"{_OURS}/attention/out/kernel", "join_first"),
        Rule(rf"{_ATTENTION}/out/bias", rf"{_OURS}/attention/out/bias"),
        Rule(rf"{_B}/MlpBlock_[03]/Dense_0/(kernel|bias)", rf"{_OURS}/mlp/up/\2"),
        Rule(rf"{_B}/MlpBlock_[03]/Dense_1/(kernel|bias)", rf"{_OURS}/mlp/down/\2"),
        Rule(r"Transformer/encoder_norm/(scale|bias)", r"encoder/norm/\1"),
        # A classifier of another width is not this tower's projection.
        Rule(r"head/kernel", "head/projection/kernel", optional=True),
    ],
    # The rest of a two-tower file, the hidden layer before a classifier, and its bias.
    ignore=[r"head/.*", r"pre_logits/.*", r"txt/.*", r"t", r"b"],
)

_L = r"encoder/layer/(\d+)"


def _hf_view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "vit/")


_TRANSFORMERS = Layout(
    name="transformers ViT",
    signature=r"(vit[./])?embeddings[./]patch_embeddings[./]projection[./](weight|kernel)",
    view=_hf_view,
    rules=[
        Rule(r"embeddings/cls_token", "encoder/class_token"),
        Rule(r"embeddings/position_embeddings", "encoder/position_embedding", "grid"),
        Rule(r"embeddings/patch_embeddings/projection/(kernel|bias)", r"encoder/patch_embed/\1"),
        *vit_rules(_L),
        Rule(r"layernorm/(scale|bias)", r"encoder/norm/\1"),
    ],
    ignore=[r"pooler/.*", r"classifier/.*", r"embeddings/mask_token", r"decoder/.*"],
)

_NAMES = {
    **STACK,
    "image_size": "image_size",
    "patch_size": "patch_size",
    "qkv_bias": "qkv_bias",
}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    if "model_cfg" in content:
        return open_clip.read_image(content)
    part = clip_part(content, "vision")
    if part is not None:  # transformers' default size
        return dataclasses.asdict(PRESETS["CLIP-ViT-B/32"]) | named(part, _NAMES)
    return named(content, _NAMES) if content.get("model_type", "vit") == "vit" else {}


VIT = EncoderFamily(
    VitConfig,
    Vit,
    "image",
    PRESETS,
    [AUGREG, _TRANSFORMERS, clip_layouts.VISION, open_clip.VISION],
    _read_config,
    # Masked autoencoders and MSN have the names of a ViT.
    model_types=("vit", "vit_mae", "vit_msn", "clip", "clip_vision_model"),
)
