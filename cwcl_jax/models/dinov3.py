"""DINOv3's ViT: Siméoni et al. 2025, arXiv 2508.10104.

Patches have rotary positions in every block, and no position is added; class token and registers
have no position. The larger models have a gated MLP; keys have no bias.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cwcl_jax.models.dinov2 import IMAGENET, RegisterVit, picture_size
from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.scaled_block import ScaledStack
from cwcl_jax.models.vit import VitConfig
from cwcl_jax.weights.config_json import STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, without_prefix


@dataclasses.dataclass(frozen=True)
class Dinov3Config(VitConfig):
    """Sizes and numerics of a DINOv3 ViT."""

    activation: str = "gelu_erf"
    epsilon: float = 1e-5
    pooling: str = "cls"
    """"cls", or "mean" over the patches."""
    registers: int = 4
    gated: bool = False
    rope_theta: float = 100.0
    qkv_bias: bool = True
    """Of queries and values."""
    key_bias: bool = False
    pixel_mean: tuple[float, float, float] = IMAGENET["pixel_mean"]
    pixel_std: tuple[float, float, float] = IMAGENET["pixel_std"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.class_token:
            raise ValueError("a DINOv3 has a class token: leave out class_token")
        if self.patch_dropout:
            raise ValueError(
                "patch_dropout is for towers that add a table of positions: a DINOv3's blocks turn "
                "each patch by its place in the whole picture"
            )
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} over {self.heads} heads is not a multiple of 4, which rotary "
                "positions of rows and columns need"
            )


_SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "S+": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536, "gated": True},
    "B": {},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
    "H+": {"width": 1280, "depth": 32, "heads": 20, "mlp_width": 5120, "gated": True},
    "7B": {
        "width": 4096,
        "depth": 40,
        "heads": 32,
        "mlp_width": 8192,
        "gated": True,
        "qkv_bias": False,
    },
}
PRESETS = {
    f"DINOv3-{size}/16": Dinov3Config(
        activation="silu" if values.get("gated") else "gelu_erf", **values
    )
    for size, values in _SIZES.items()
}


class Dinov3(RegisterVit):
    """Encoder of images {"pixels": uint8 (b, y, x, 3)}."""

    adds_positions = False

    def stack(self) -> ScaledStack:
        """Returns the settings of the blocks."""
        turn = (self.config.grid, self.config.rope_theta)
        return dataclasses.replace(super().stack(), turn=turn)


# Names in DINOv3 files, as transformers writes them; newer files have `model.layer`.
_L = r"(?:model/)?layer/(\d+)"
_OURS = r"encoder/blocks/\1"


def _view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "dinov3_vit/")


_FILES = Layout(
    name="DINOv3 ViT",
    signature=r"((dinov3_vit|model)[./])*layer[./]0[./]layer_scale1[./]lambda1",
    view=_view,
    rules=[
        Rule(r"embeddings/cls_token", "encoder/class_token"),
        Rule(r"embeddings/register_tokens", "encoder/registers"),
        Rule(r"embeddings/patch_embeddings/(kernel|bias)", r"encoder/patch_embed/\1"),
        Rule(rf"{_L}/norm([12])/(scale|bias)", rf"{_OURS}/norm\2/\3"),
        Rule(rf"{_L}/layer_scale([12])/lambda1", rf"{_OURS}/scale\2"),
        *(
            Rule(rf"{_L}/attention/{theirs}_proj/(kernel|bias)", rf"{_OURS}/attention/{ours}/\2")
            for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
        ),
        Rule(rf"{_L}/mlp/(gate|up|down)_proj/(kernel|bias)", rf"{_OURS}/mlp/\2/\3"),
        Rule(r"norm/(scale|bias)", r"encoder/norm/\1"),
    ],
    ignore=[r"embeddings/mask_token", r"classifier/.*", r"rope_embeddings/.*"],
)

_NAMES = {
    **STACK,
    "image_size": "image_size",
    "patch_size": "patch_size",
    "qkv_bias": "query_bias",
    "key_bias": "key_bias",
    "registers": "num_register_tokens",
    "gated": "use_gated_mlp",
    "rope_theta": "rope_theta",
}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    if content.get("model_type") != "dinov3_vit":
        return {}
    if content.get("query_bias", True) != content.get("value_bias", True):
        raise ValueError("query_bias and value_bias differ, which is not supported")
    if not (content.get("proj_bias", True) and content.get("mlp_bias", True)):
        raise ValueError("proj_bias=False or mlp_bias=False is not supported")
    # Defaults of transformers: the small model's sizes, and no registers.
    usual = {"width": 384, "heads": 6, "mlp_width": 1536, "registers": 0}
    return usual | named(content, _NAMES)


DINOV3 = EncoderFamily(
    Dinov3Config,
    Dinov3,
    "image",
    PRESETS,
    [_FILES],
    _read_config,
    read_processor=picture_size,
    model_types=("dinov3_vit",),
)
