"""Names of one layer in files that several families share."""

import re

from cwcl_jax.weights.rules import Rule

_OURS = r"encoder/blocks/\1"


def layer_rules(
    layer: str,
    *,
    norm1: str = "self_attn_layer_norm",
    norm2: str = "final_layer_norm",
    mlp: str = "",
) -> list[Rule]:
    """Returns rules for one layer in the names of BART, Whisper and, with other norms, CLIP."""
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


def vit_rules(layer: str) -> list[Rule]:
    """Returns rules for one layer in the names of ViT, by older and newer transformers."""
    parts = {"query": "q", "key": "k", "value": "v"}
    attention = [
        Rule(
            rf"{layer}/attention/(?:attention/{part}|{short}_proj)/(kernel|bias)",
            rf"{_OURS}/attention/{part}/\2",
        )
        for part, short in parts.items()
    ]
    out = rf"{layer}/attention/(?:output/dense|o_proj)/(kernel|bias)"
    return [
        Rule(rf"{layer}/layernorm_before/(scale|bias)", rf"{_OURS}/norm1/\2"),
        Rule(rf"{layer}/layernorm_after/(scale|bias)", rf"{_OURS}/norm2/\2"),
        *attention,
        Rule(out, rf"{_OURS}/attention/out/\2"),
        Rule(rf"{layer}/(?:intermediate/dense|mlp/fc1)/(kernel|bias)", rf"{_OURS}/mlp/up/\2"),
        Rule(rf"{layer}/(?:output/dense|mlp/fc2)/(kernel|bias)", rf"{_OURS}/mlp/down/\2"),
    ]


def in_projection(name: str) -> list[str]:
    """Returns names of query, key and value, which PyTorch's attention keeps in one array."""
    joined = re.fullmatch(r"(.+)/in_proj_(weight|bias)", name)
    if joined is None:
        return []
    kind = "kernel" if joined[2] == "weight" else "bias"
    return [f"{joined[1]}/{part}/{kind}" for part in ("query", "key", "value")]
