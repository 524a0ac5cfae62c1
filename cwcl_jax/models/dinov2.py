"""DINOv2: Oquab et al. 2023, arXiv 2304.07193; registers: Darcet et al. 2023, arXiv 2309.16588.

A ViT whose blocks scale their branches (LayerScale); the giant model has a gated MLP. Registers are
tokens without a position between class token and patches. No pooling reads them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.scaled_block import ScaledBlock, ScaledStack
from cwcl_jax.models.transformer import Execution
from cwcl_jax.models.vit import Vit, VitConfig
from cwcl_jax.weights.config_json import STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import RenamedWeights, flax_names, without_prefix

# Mean and standard deviation of ImageNet's pixels.
IMAGENET = {
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
}


@dataclasses.dataclass(frozen=True)
class Dinov2Config(VitConfig):
    """Sizes and numerics of a DINOv2."""

    patch_size: int = 14
    activation: str = "gelu_erf"
    pooling: str = "cls"
    """"cls", or "mean" over the patches."""
    registers: int = 0
    gated: bool = False
    """Whether the MLP is gated, as in the giant model; its activation is silu."""
    pixel_mean: tuple[float, float, float] = IMAGENET["pixel_mean"]
    pixel_std: tuple[float, float, float] = IMAGENET["pixel_std"]


# Table 17 of arXiv 2304.07193. Published position grids have 37 x 37 patches (518 pixels).
_SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "B": {},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
    "g": {
        "width": 1536,
        "depth": 40,
        "heads": 24,
        "mlp_width": 4096,
        "gated": True,
        "activation": "silu",
    },
}
PRESETS = {
    f"DINOv2-{size}/14{suffix}": Dinov2Config(registers=registers, **values)
    for size, values in _SIZES.items()
    for suffix, registers in (("", 0), ("-registers", 4))
}


class RegisterVit(Vit):
    """A ViT of scaled blocks with registers after the class token."""

    config: Any
    block = ScaledBlock

    def __init__(self, config: Any, execution: Execution, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, execution, rngs=rngs)
        if config.registers:
            shape = (1, config.registers, config.width)
            draw = nnx.initializers.normal(0.02)
            self.registers = nnx.Param(draw(rngs.params(), shape, execution.param_dtype))

    def stack(self) -> ScaledStack:
        """Returns the settings of the blocks."""
        config = self.config
        stack = ScaledStack.of(
            config,
            norm_order="pre",
            query_value_bias=config.qkv_bias,
            key_bias=getattr(config, "key_bias", config.qkv_bias),
        )
        return dataclasses.replace(stack, gated=config.gated)

    def embed(
        self, pixels: UInt8[Array, "b y x 3"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Returns class token, registers and patches."""
        x = super().embed(pixels, key)
        if not self.config.registers:
            return x
        registers = self.registers[...].astype(x.dtype)
        registers = jnp.broadcast_to(registers, (x.shape[0], *registers.shape[1:]))
        return jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        tokens = self.tokens(inputs, key)
        if self.config.pooling == "cls":
            return tokens[:, 0]
        return jnp.mean(tokens[:, 1 + self.config.registers :], axis=1)


# Names in DINOv2 files, as transformers writes them.
_L = r"encoder/layer/(\d+)"
_OURS = r"encoder/blocks/\1"
_ATTENTION = rf"{_OURS}/attention"


def _view(weights: Weights) -> Weights:
    return _separate(without_prefix(flax_names(weights), "dinov2(?:_with_registers)?/"))


def _separate(weights: Weights) -> Weights:
    """Returns a view that separates gate and up of a gated MLP, which files keep in one array."""
    names: dict[str, Any] = {}
    for name, entry in weights.entries.items():
        if "/mlp/weights_in/" not in name:
            names[name] = (name, lambda x: x)
            continue
        half = entry.shape[-1] // 2
        names[name.replace("weights_in", "gate_proj")] = (name, lambda x, n=half: x[..., :n])
        names[name.replace("weights_in", "up_proj")] = (name, lambda x, n=half: x[..., n:])
    return RenamedWeights(weights, names)


def _layout(name: str, signature: str, grid: str) -> Layout:
    return Layout(
        name=name,
        signature=rf"(dinov2(_with_registers)?[./])?{signature}",
        view=_view,
        rules=[
            Rule(r"embeddings/cls_token", "encoder/class_token"),
            Rule(r"embeddings/register_tokens", "encoder/registers"),
            Rule(r"embeddings/position_embeddings", "encoder/position_embedding", grid),
            Rule(
                r"embeddings/patch_embeddings/projection/(kernel|bias)", r"encoder/patch_embed/\1"
            ),
            Rule(rf"{_L}/norm([12])/(scale|bias)", rf"{_OURS}/norm\2/\3"),
            Rule(rf"{_L}/layer_scale([12])/lambda1", rf"{_OURS}/scale\2"),
            # Names in published files, followed by those of newer ones.
            Rule(
                rf"{_L}/attention/attention/(query|key|value)/(kernel|bias)",
                rf"{_OURS}/attention/\2/\3",
            ),
            Rule(rf"{_L}/attention/output/dense/(kernel|bias)", rf"{_OURS}/attention/out/\2"),
            *(
                Rule(
                    rf"{_L}/attention/{theirs}_proj/(kernel|bias)", rf"{_OURS}/attention/{ours}/\2"
                )
                for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
            ),
            Rule(rf"{_L}/mlp/(fc1|up_proj)/(kernel|bias)", rf"{_OURS}/mlp/up/\3"),
            Rule(rf"{_L}/mlp/gate_proj/(kernel|bias)", rf"{_OURS}/mlp/gate/\2"),
            Rule(rf"{_L}/mlp/(fc2|weights_out|down_proj)/(kernel|bias)", rf"{_OURS}/mlp/down/\3"),
            Rule(r"layernorm/(scale|bias)", r"encoder/norm/\1"),
        ],
        ignore=[r"classifier/.*", r"embeddings/mask_token"],
    )


# For another picture size, transformers resizes the positions of the two kinds differently.
_WITH_REGISTERS = _layout(
    "DINOv2 with registers", r"embeddings[./]register_tokens", "bicubic_grid_antialias"
)
_PLAIN = _layout("DINOv2", r"encoder[./]layer[./]0[./]layer_scale1[./]lambda1", "bicubic_grid")

_NAMES = {
    **STACK,
    "image_size": "image_size",
    "patch_size": "patch_size",
    "qkv_bias": "qkv_bias",
    "registers": "num_register_tokens",
    "gated": "use_swiglu_ffn",
}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    if content.get("model_type", "dinov2") not in ("dinov2", "dinov2_with_registers"):
        return {}
    settings = named(content, _NAMES)
    hidden = int(settings.get("width", 768) * content.get("mlp_ratio", 4))
    if settings.get("gated"):
        hidden = (hidden * 2 // 3 + 7) // 8 * 8
        settings["activation"] = "silu"
    return settings | {"mlp_width": hidden}


def picture_size(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the size that an image processor outputs.

    These models read pictures of any size and resize their positions.
    """
    cut = content.get("crop_size") if content.get("do_center_crop", True) else None
    size = cut or content.get("size") or {}
    side = size.get("height") if isinstance(size, dict) else size
    return {"image_size": side} if isinstance(side, int) else {}


DINOV2 = EncoderFamily(
    Dinov2Config,
    RegisterVit,
    "image",
    PRESETS,
    [_WITH_REGISTERS, _PLAIN],
    _read_config,
    read_processor=picture_size,
    model_types=("dinov2", "dinov2_with_registers"),
)
