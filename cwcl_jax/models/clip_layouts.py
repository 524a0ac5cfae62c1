"""Names in CLIP files, as transformers writes them: `CLIPModel`, or one tower with its projection.

A joint file feeds two towers: each uses its own names and ignores the other's and the logit scale.
The projections, which have no bias, become linear heads if embed_dim matches.
"""

from cwcl_jax.models.layer_names import layer_rules
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, without_prefix

_LAYERS = layer_rules(
    r"encoder/layers/(\d+)", norm1="layer_norm1", norm2="layer_norm2", mlp=r"mlp/"
)
_TEXT_ONLY = [r"text_model/.*", r"text_projection/.*"]
_VISION_ONLY = [r"vision_model/.*", r"visual_projection/.*"]


def _text_view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "text_model/")


def _vision_view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "vision_model/")


TEXT = Layout(
    name="CLIP text",
    signature=r"(text_model[./])?embeddings[./]token_embedding[./](weight|embedding)",
    view=_text_view,
    rules=[
        Rule(r"embeddings/(token|position)_embedding/embedding", r"encoder/\1_embedding/embedding"),
        *_LAYERS,
        Rule(r"final_layer_norm/(scale|bias)", r"encoder/norm/\1"),
        Rule(r"text_projection/kernel", "head/projection/kernel", optional=True),
    ],
    # Older files hold the row numbers of the position table.
    ignore=[*_VISION_ONLY, "logit_scale", r"embeddings/position_ids"],
)

VISION = Layout(
    name="CLIP image",
    # Transformers' spelling; SigLIP's tower, which differs, has no such norm.
    signature=r"(vision_model[./])?pre_layrnorm[./](weight|scale)",
    view=_vision_view,
    rules=[
        Rule(r"embeddings/class_embedding", "encoder/class_token", "one_token"),
        Rule(r"embeddings/patch_embedding/kernel", "encoder/patch_embed/kernel"),
        Rule(
            r"embeddings/position_embedding/embedding",
            "encoder/position_embedding",
            "table_to_grid",
        ),
        Rule(r"pre_layrnorm/(scale|bias)", r"encoder/embedding_norm/\1"),
        *_LAYERS,
        Rule(r"post_layernorm/(scale|bias)", r"encoder/norm/\1"),
        Rule(r"visual_projection/kernel", "head/projection/kernel", optional=True),
    ],
    ignore=[*_TEXT_ONLY, "logit_scale", r"embeddings/position_ids"],
)
