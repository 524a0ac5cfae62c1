"""SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786), fixed resolution.

The image tower is a ViT without a class token whose patches are pooled by one learned query,
followed by an MLP. The text tower also attends to its padding, reads its last position, padding or
not, and ends with a dense layer. SigLIP 2 differs only in its vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.layer_names import in_projection, layer_rules
from cwcl_jax.models.pooling import pool
from cwcl_jax.models.text import TextConfig, TextTransformer
from cwcl_jax.models.transformer import (
    Execution,
    Mlp,
    TransformerConfig,
    layer_norm,
    linear,
)
from cwcl_jax.models.vit import Vit, VitConfig
from cwcl_jax.weights.config_json import STACK, clip_part, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import apart, flax_names, without_prefix


@dataclasses.dataclass(frozen=True)
class SiglipConfig(VitConfig):
    """Sizes and numerics of SigLIP's image tower."""

    class_token: bool = False
    pooling: str = "attention"
    """"attention" is SigLIP's own: one learned query, and an MLP; or "mean" over the patches."""

    def __post_init__(self) -> None:
        # 384 pixels are 27 patches of 14 and, as published, a border of 6 pixels that is not read.
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )
        if self.pooling not in ("attention", "mean"):
            raise ValueError(
                f"pooling of a SigLIP image tower is 'attention' or 'mean', not {self.pooling!r}"
            )
        if self.class_token:
            raise ValueError("a SigLIP image tower has no class token: leave out class_token")


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig(TextConfig):
    """Sizes and numerics of SigLIP's text tower."""

    max_tokens: int = 64
    width: int = 768
    heads: int = 12
    mlp_width: int = 3072
    pooling: str = "padded"
    """"padded" is SigLIP's own: the last of `max_tokens` places, all of which see each other, and a
    dense layer; or "mean", "last" and "cls" over the real tokens, which see no padding."""
    pad_token: int = 1
    """The id after a text, up to `max_tokens`: the tower reads it."""
    projection: int = 0
    """Width of the dense layer of "padded"; 0 is `width`."""

    def __post_init__(self) -> None:
        if self.pooling not in ("padded", "mean", "last", "cls"):
            raise ValueError(
                "pooling of a SigLIP text tower is 'padded', 'mean', 'last' or 'cls', not "
                f"{self.pooling!r}"
            )
        if self.causal:
            raise ValueError("a SigLIP text tower is not causal: leave out causal")


# Width, depth, heads, MLP width: the ViT's B and L; So400m: arXiv 2305.13035; g: arXiv 2502.14786.
_SIZES = {
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "g": (1536, 40, 16, 6144),
}


def _sized(size: str) -> dict[str, Any]:
    return dict(zip(("width", "depth", "heads", "mlp_width"), _SIZES[size], strict=True))


# Size, patch, pixels; both generations.
_PUBLISHED = (
    ("B", 16, 224), ("B", 16, 256), ("B", 16, 384), ("B", 16, 512), ("B", 32, 256),
    ("L", 16, 256), ("L", 16, 384), ("L", 16, 512),
    ("So400m", 14, 224), ("So400m", 14, 384), ("So400m", 16, 256), ("So400m", 16, 384),
    ("So400m", 16, 512), ("g", 16, 256), ("g", 16, 384),
)  # fmt: skip
PRESETS = {
    f"SigLIP-{size}/{patch}-{pixels}": SiglipConfig(
        image_size=pixels, patch_size=patch, **_sized(size)
    )
    for size, patch, pixels in _PUBLISHED
}
TEXT_PRESETS = {f"SigLIP-{size}": SiglipTextConfig(**_sized(size)) for size in ("B", "L", "So400m")}
# Gemma's vocabulary, whose padding id is 0; the giant image tower has So400m's text tower.
TEXT_PRESETS |= {
    name.replace("SigLIP", "SigLIP2"): dataclasses.replace(config, vocab_size=256000, pad_token=0)
    for name, config in TEXT_PRESETS.items()
}
TEXT_PRESETS["SigLIP2-g"] = dataclasses.replace(TEXT_PRESETS["SigLIP2-So400m"], projection=1536)


class QueryPool(nnx.Module):
    """One learned query that attends to all tokens, then an MLP with a residual connection."""

    def __init__(self, config: TransformerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        width = config.width
        init = nnx.initializers.xavier_uniform()
        self.probe = nnx.Param(init(rngs.params(), (1, 1, width), execution.param_dtype))
        self.query = linear(width, width, execution, rngs)
        self.key = linear(width, width, execution, rngs)
        self.value = linear(width, width, execution, rngs)
        self.out = linear(width, width, execution, rngs)
        self.norm = layer_norm(width, config.epsilon, execution, rngs)
        self.mlp = Mlp(config, execution, rngs=rngs)
        self.heads = config.heads

    def __call__(self, tokens: Float[Array, "b s d"]) -> Float[Array, "b d"]:
        b, s, d = tokens.shape
        probe = jnp.broadcast_to(self.probe[...].astype(tokens.dtype), (b, 1, d))
        shape = (self.heads, d // self.heads)
        mixed = jax.nn.dot_product_attention(
            self.query(probe).reshape(b, 1, *shape),
            self.key(tokens).reshape(b, s, *shape),
            self.value(tokens).reshape(b, s, *shape),
        )
        x = self.out(mixed.reshape(b, d))
        return x + self.mlp(self.norm(x)[:, None])[:, 0]


class SiglipImage(Vit):
    """Encoder of images {"pixels": uint8 (b, y, x, 3)}."""

    def __init__(self, config: SiglipConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, execution, rngs=rngs)
        if config.pooling == "attention":
            self.pooling = QueryPool(self.stack(), execution, rngs=rngs)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        if self.config.pooling == "mean":
            return pool(self.tokens(inputs, key), None, "mean")
        return self.pooling(self.tokens(inputs, key))


class SiglipText(TextTransformer):
    """Encoder of {"tokens": int32 (b, s), "mask": bool (b, s)}."""

    def __init__(self, config: SiglipTextConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, execution, rngs=rngs)
        if config.pooling == "padded":
            self.pooler = linear(config.width, self.feature_width, execution, rngs)

    @property
    def feature_width(self) -> int:
        """Width of a feature vector."""
        config: Any = self.config
        return (config.projection if config.pooling == "padded" else 0) or config.width

    def padded(
        self, tokens: Int[Array, "b s"], mask: Bool[Array, "b s"]
    ) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
        """Returns all positions that the tower reads: a batch may be cut to its longest text."""
        config: Any = self.config
        tokens = jnp.where(mask, tokens, config.pad_token)
        missing = max(0, config.max_tokens - tokens.shape[1])
        tokens = jnp.pad(tokens, ((0, 0), (0, missing)), constant_values=config.pad_token)
        return tokens, jnp.ones(tokens.shape, bool)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        if self.config.pooling != "padded":
            return super().__call__(inputs, key)
        tokens, mask = self.padded(inputs["tokens"], inputs["mask"])
        return self.pooler(self.tokens({"tokens": tokens, "mask": mask}, key)[:, -1])


# Names in SigLIP files, as transformers writes them.
_LAYERS = layer_rules(
    r"encoder/layers/(\d+)", norm1="layer_norm1", norm2="layer_norm2", mlp=r"mlp/"
)
_IGNORE = [r"logit_(scale|bias)", r"embeddings/position_ids", r"classifier/.*"]


def _view(part: str) -> Callable[[Weights], Weights]:
    """Returns a view of one tower's names; the other's keep their prefix, which excludes them."""
    prefix = f"(?:siglip/)?{part}/"
    return lambda weights: apart(
        without_prefix(flax_names(weights), prefix), in_projection, turned=True
    )


VISION = Layout(
    name="SigLIP image",
    # CLIP's tower has a class embedding but no such pooling; files without it need config.json.
    signature=r"(siglip[./])?(vision_model[./])?head[./]probe",
    view=_view("vision_model"),
    rules=[
        Rule(r"embeddings/patch_embedding/(kernel|bias)", r"encoder/patch_embed/\1"),
        Rule(
            r"embeddings/position_embedding/embedding",
            "encoder/position_embedding",
            "table_to_bicubic_grid",
        ),
        *_LAYERS,
        Rule(r"post_layernorm/(scale|bias)", r"encoder/norm/\1"),
        Rule(r"head/probe", "encoder/pooling/probe", optional=True),
        Rule(
            r"head/attention/(query|key|value)/(kernel|bias)",
            r"encoder/pooling/\1/\2",
            optional=True,
        ),
        Rule(r"head/attention/out_proj/(kernel|bias)", r"encoder/pooling/out/\1", optional=True),
        Rule(r"head/layernorm/(scale|bias)", r"encoder/pooling/norm/\1", optional=True),
        Rule(r"head/mlp/fc1/(kernel|bias)", r"encoder/pooling/mlp/up/\1", optional=True),
        Rule(r"head/mlp/fc2/(kernel|bias)", r"encoder/pooling/mlp/down/\1", optional=True),
    ],
    ignore=[*_IGNORE, r"(siglip/)?text_model/.*"],
)
TEXT = Layout(
    name="SigLIP text",
    # CLIP's text tower has no dense layer of its own.
    signature=r"(siglip[./])?text_model[./]head[./](weight|kernel)|head\.weight",
    view=_view("text_model"),
    rules=[
        Rule(r"embeddings/(token|position)_embedding/embedding", r"encoder/\1_embedding/embedding"),
        *_LAYERS,
        Rule(r"final_layer_norm/(scale|bias)", r"encoder/norm/\1"),
        Rule(r"head/(kernel|bias)", r"encoder/pooler/\1", optional=True),
    ],
    ignore=[*_IGNORE, r"(siglip/)?vision_model/.*"],
)


def _refuse_any_shape(content: Mapping[str, Any]) -> None:
    if str(content.get("model_type", "")).startswith("siglip2"):
        raise ValueError(
            "this SigLIP 2 reads pictures of any shape (NaFlex), which is not supported: take one "
            "of fixed resolution, such as siglip2-base-patch16-224"
        )


def _read_image(content: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_any_shape(content)
    part = clip_part(content, "vision", "siglip")
    if part is None:
        return {}
    settings = named(part, {**STACK, "image_size": "image_size", "patch_size": "patch_size"})
    # transformers' default is B/16.
    settings = dataclasses.asdict(PRESETS["SigLIP-B/16-224"]) | settings
    return settings if part.get("vision_use_head", True) else settings | {"pooling": "mean"}


def _read_text(content: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_any_shape(content)
    part = clip_part(content, "text", "siglip")
    if part is None:
        return {}
    names = {
        **STACK,
        "vocab_size": "vocab_size",
        "max_tokens": "max_position_embeddings",
        "pad_token": "pad_token_id",
    }
    settings = dataclasses.asdict(TEXT_PRESETS["SigLIP-B"]) | named(part, names)
    projection = part.get("projection_size") or settings["width"]
    if "pad_token_id" not in part and settings["vocab_size"] == 256000:
        settings["pad_token"] = 0  # Gemma's, which SigLIP 2's files do not store
    return settings | {"projection": 0 if projection == settings["width"] else projection}


def _types(part: str) -> tuple[str, ...]:
    """Returns the model types of config.json; NaFlex models share them and are refused later."""
    return ("siglip", f"siglip_{part}_model", "siglip2", f"siglip2_{part}_model")


SIGLIP = EncoderFamily(
    SiglipConfig,
    SiglipImage,
    "image",
    PRESETS,
    [VISION],
    _read_image,
    model_types=_types("vision"),
)
SIGLIP_TEXT = EncoderFamily(
    SiglipTextConfig,
    SiglipText,
    "text",
    TEXT_PRESETS,
    [TEXT],
    _read_text,
    model_types=_types("text"),
)
