"""Names of vision transformers: AugReg and big_vision `.npz` files, and transformers' ViT.

big_vision renamed its modules once (`MultiHeadDotProductAttention_1` to `..._0`, `MlpBlock_3` to
`..._0`, `LayerNorm_2` to `..._1`) and can store all layers in one array; both forms are read.
"""

from cwcl_jax.pretrained.readers import Weights
from cwcl_jax.pretrained.rules import Family, Rule
from cwcl_jax.pretrained.views import flax_names, unstacked, without_prefix

_B = r"Transformer/encoderblock_(\d+)"
_ATTENTION = rf"{_B}/MultiHeadDotProductAttention_[01]"
_OURS = r"encoder/blocks/\1"


def _augreg_view(weights: Weights) -> Weights:
    """Without the prefixes of train states and of two-tower models, one array per layer."""
    plain = without_prefix(weights, r"(?:opt/target/|params/)?(?:img/)?")
    return unstacked(plain, r"(Transformer/encoderblock)(/.+)")


AUGREG = Family(
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
_HF_ATTENTION = rf"{_L}/attention"


def _hf_view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "vit/")


TRANSFORMERS = Family(
    name="transformers ViT",
    signature=r"(vit[./])?embeddings[./]patch_embeddings[./]projection[./](weight|kernel)",
    view=_hf_view,
    rules=[
        Rule(r"embeddings/cls_token", "encoder/class_token"),
        Rule(r"embeddings/position_embeddings", "encoder/position_embedding", "grid"),
        Rule(r"embeddings/patch_embeddings/projection/(kernel|bias)", r"encoder/patch_embed/\1"),
        Rule(rf"{_L}/layernorm_before/(scale|bias)", rf"{_OURS}/norm1/\2"),
        Rule(rf"{_L}/layernorm_after/(scale|bias)", rf"{_OURS}/norm2/\2"),
        Rule(
            rf"{_HF_ATTENTION}/attention/(query|key|value)/(kernel|bias)",
            rf"{_OURS}/attention/\2/\3",
        ),
        Rule(rf"{_HF_ATTENTION}/output/dense/(kernel|bias)", rf"{_OURS}/attention/out/\2"),
        Rule(rf"{_L}/intermediate/dense/(kernel|bias)", rf"{_OURS}/mlp/up/\2"),
        Rule(rf"{_L}/output/dense/(kernel|bias)", rf"{_OURS}/mlp/down/\2"),
        Rule(r"layernorm/(scale|bias)", r"encoder/norm/\1"),
    ],
    ignore=[r"pooler/.*", r"classifier/.*", r"embeddings/mask_token", r"decoder/.*"],
)
