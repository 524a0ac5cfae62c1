"""A tower: an encoder and a head for one kind of input. Its embeddings are always L2-normalised."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cwcl_jax.models.encoders import build_encoder, encoder_config
from cwcl_jax.models.heads import make_head
from cwcl_jax.models.numerics import l2_normalize
from cwcl_jax.models.transformer import Execution
from cwcl_jax.precision import products_at, require_precision


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """The settings of one tower in an experiment."""

    encoder: str
    """"vit", "siglip", "dinov2", "dinov3"; "bert", "roberta", "modernbert", "mpnet", "bart",
    "text", "siglip_text"; "whisper", "wav2vec2", "hubert", "wavlm", "ast", "conv_speech";
    "precomputed"; or "module:Class" of your own."""
    preset: str = ""
    """A size by name, for example "ViT-L/16", "tiny", "whisper-small", "MiniLM-L6"."""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the encoder's own settings, replaced by name."""
    weights: str = ""
    """"" trains from scratch; else a file, a folder, a hub id, or "package:NAME"."""
    tune: str = "all"
    """"all", "none" (locked), "head", "last:K", or regexes of paths separated by commas; "lora:R"
    adds LoRA of rank R to locked kernels, also beside one of these: "head+lora:R"."""
    lora_kernels: str = "encoder/.*"
    """Kernels that "lora:R" adds to: regexes, separated by commas, full matches on paths below the
    tower, such as `encoder/blocks/.*/(query|value)/kernel`. Trained kernels get no addition.
    """
    lora_alpha: float = 0.0
    """The addition is alpha / R times the low-rank product; 0 stands for R, the factor 1."""
    head: str = "linear"
    """"none", "linear" or "mlp"."""
    pooling: str = ""
    """"" is the encoder's default."""
    dtype: str = ""
    """Compute dtype; "" is the experiment's."""
    precision: str = ""
    """Of float32 products, "highest", "high" or "default"; "" is the experiment's."""
    scan_layers: bool = False
    remat: str = "auto"
    """What a block keeps for the backward pass: "none", "dots", "dots_no_batch" or "full"; "auto"
    is "dots" on a GPU, else "none". See `models.transformer.Execution`.
    """
    attention: str = "auto"
    modality: str = ""
    """What it reads: "image", "text", "speech", "features", or "module:Name" of your own; "" is the
    encoder's modality.
    """

    def encoder_settings(self) -> Any:
        """Returns the encoder's own settings: those of the preset, with the overrides applied.

        Raises:
          ValueError: there is no such encoder, preset, field or pooling.
        """
        return encoder_config(self.encoder, self.preset, self.overrides, self.pooling)


class Tower(nnx.Module):
    """Encoder, pooling and head for one kind of input."""

    def __init__(
        self,
        config: TowerConfig,
        arrays: Mapping[str, Any],
        *,
        embed_dim: int,
        dtype: str,
        precision: str = "highest",
        rngs: nnx.Rngs,
    ) -> None:
        """Builds a tower.

        Args:
          config: the tower's settings.
          arrays: name -> (shape, dtype) of one example's inputs, as the tower's modality declares.
          dtype, precision: the experiment's, used if the tower's settings name none.
        """
        self.precision = config.precision or precision
        require_precision(self.precision)
        settings = config.encoder_settings()
        execution = Execution(
            dtype=jnp.dtype(config.dtype or dtype),
            scan_layers=config.scan_layers,
            remat=config.remat,
            attention=config.attention,
        )
        self.dtype = execution.dtype
        self.reads_features = "features" in arrays
        self.encoder = build_encoder(config.encoder, settings, execution, arrays, rngs=rngs)
        width = self.encoder.feature_width
        self.head = nnx.data(make_head(config.head, width, embed_dim, execution, rngs=rngs))

    @property
    def feature_width(self) -> int:
        """Width of the rows of `features`."""
        return self.encoder.feature_width

    def features(
        self, inputs: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b f"]:
        """Returns the pooled encoder output, (b, f).

        Dropout is active only with `rngs`, whose stream is `dropout`.

        Inputs {"features": (b, f)} are earlier outputs of this encoder and are returned unchanged,
        unless features are what the encoder reads.
        """
        if "features" in inputs and not self.reads_features:
            return inputs["features"]
        key = None if rngs is None else rngs.dropout()
        with self._products():
            return self.encoder(inputs, key)

    def project(self, features: Float[Array, "b f"]) -> Float[Array, "b d"]:
        """Returns the head's output with unit norm, in float32."""
        with self._products():
            embeds = features if self.head is None else self.head(features)
        return l2_normalize(embeds)

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        """Sets the precision of float32 products, also inside a user's encoder."""
        if self.dtype != jnp.float32:
            return contextlib.nullcontext()
        return products_at(self.precision)

    def __call__(
        self, inputs: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b d"]:
        return self.project(self.features(inputs, rngs=rngs))
