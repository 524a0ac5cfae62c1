"""Names of BERT, RoBERTa and BART files, as transformers (PyTorch or Flax) writes them."""

from cwcl_jax.pretrained.readers import Weights
from cwcl_jax.pretrained.rules import Family, Rule
from cwcl_jax.pretrained.views import flax_names, without_prefix

_OURS = r"encoder/blocks/\1"
_B = r"encoder/layer/(\d+)"

_BERT_RULES = [
    Rule(r"embeddings/word_embeddings/embedding", "encoder/token_embedding/embedding"),
    Rule(r"embeddings/position_embeddings/embedding", "encoder/position_embedding/embedding"),
    Rule(r"embeddings/token_type_embeddings/embedding", "encoder/type_embedding/embedding"),
    Rule(r"embeddings/LayerNorm/(scale|bias)", r"encoder/embedding_norm/\1"),
    Rule(rf"{_B}/attention/self/(query|key|value)/(kernel|bias)", rf"{_OURS}/attention/\2/\3"),
    Rule(rf"{_B}/attention/output/dense/(kernel|bias)", rf"{_OURS}/attention/out/\2"),
    Rule(rf"{_B}/attention/output/LayerNorm/(scale|bias)", rf"{_OURS}/norm1/\2"),
    Rule(rf"{_B}/intermediate/dense/(kernel|bias)", rf"{_OURS}/mlp/up/\2"),
    Rule(rf"{_B}/output/dense/(kernel|bias)", rf"{_OURS}/mlp/down/\2"),
    Rule(rf"{_B}/output/LayerNorm/(scale|bias)", rf"{_OURS}/norm2/\2"),
    Rule(r"pooler/dense/(kernel|bias)", r"encoder/pooler/\1", optional=True),
]
_BERT_SIGNATURE = r"embeddings[./]token_type_embeddings[./](weight|embedding)"
# Buffers of older files, and heads for other tasks.
_BERT_IGNORE = [r"embeddings/position_ids", r"(cls|lm_head|classifier|qa_outputs)/.*"]


def _bert_view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "(?:bert|roberta)/")


BERT = Family(
    name="BERT",
    signature=rf"(bert[./])?{_BERT_SIGNATURE}",
    rules=_BERT_RULES,
    ignore=_BERT_IGNORE,
    view=_bert_view,
)
ROBERTA = Family(
    name="RoBERTa",
    signature=rf"(roberta[./])?{_BERT_SIGNATURE}",
    rules=_BERT_RULES,
    ignore=_BERT_IGNORE,
    view=_bert_view,
)

_L = r"encoder/layers/(\d+)"


def layer_rules(
    layer: str,
    *,
    norm1: str = "self_attn_layer_norm",
    norm2: str = "final_layer_norm",
    mlp: str = "",
) -> list[Rule]:
    """One layer in the names that BART, Whisper and, with other norms, CLIP share."""
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    attention = [
        Rule(rf"{layer}/self_attn/{theirs}/(kernel|bias)", rf"{_OURS}/attention/{ours}/\2")
        for theirs, ours in names.items()
    ]
    return [
        *attention,
        Rule(rf"{layer}/{norm1}/(scale|bias)", rf"{_OURS}/norm1/\2"),
        Rule(rf"{layer}/{mlp}fc1/(kernel|bias)", rf"{_OURS}/mlp/up/\2"),
        Rule(rf"{layer}/{mlp}fc2/(kernel|bias)", rf"{_OURS}/mlp/down/\2"),
        Rule(rf"{layer}/{norm2}/(scale|bias)", rf"{_OURS}/norm2/\2"),
    ]


def _bart_view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "model/")


BART = Family(
    name="BART",
    signature=r"(model[./])?encoder[./]layernorm_embedding[./](weight|scale)",
    view=_bart_view,
    rules=[
        # The table is stored once for encoder and decoder, by some writers under both names.
        Rule(r"(?:shared|encoder/embed_tokens)/embedding", "encoder/token_embedding/embedding"),
        Rule(
            r"encoder/embed_positions/embedding",
            "encoder/position_embedding/embedding",
            "drop_two_rows",
        ),
        Rule(r"encoder/layernorm_embedding/(scale|bias)", r"encoder/embedding_norm/\1"),
        *layer_rules(_L),
    ],
    ignore=[r"(decoder|lm_head|classification_head|qa_outputs)/.*", r"final_logits_bias"],
)
