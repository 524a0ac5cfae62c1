"""Names of one layer in the files of BART, Whisper and, with other norms, CLIP."""

from cwcl_jax.weights.rules import Rule

_OURS = r"encoder/blocks/\1"


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
