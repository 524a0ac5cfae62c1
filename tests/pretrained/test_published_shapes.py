"""Files of published sizes, in the names that published files have, find every leaf of a preset.

The sizes are those of transformers' classes on the meta device: names and shapes, no weights.
"""

import dataclasses
import re

import numpy as np
import pytest

from cwcl_jax.models.encoders import ENCODERS
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.weights.readers import Entry
from cwcl_jax.weights.rules import make_plan
from tests.pretrained.against_torch import abstract, torch, transformers

GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
DINOV3 = {"num_register_tokens": 4}


@dataclasses.dataclass
class NamesOnly:
    """A file of which only names and shapes are known."""

    entries: dict[str, Entry]
    source: str = "published"

    def read(self, name):
        raise AssertionError(f"{name} is read, where shapes are enough")


def older_dinov2(shapes):
    """Names from before transformers 5, with gate and up of a gated MLP in one array."""
    renamed = {}
    for name, shape in shapes.items():
        for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
            name = name.replace(f".attention.{new}_proj.", f".attention.attention.{old}.")
        name = name.replace(".attention.o_proj.", ".attention.output.dense.")
        if ".mlp.gate_proj." in name:
            continue
        if ".mlp.down_proj." in name:
            name = name.replace("down_proj", "weights_out")
        if ".mlp.up_proj." in name:
            name, shape = name.replace("up_proj", "weights_in"), (2 * shape[0], *shape[1:])
        renamed[name] = shape
    return renamed


def older_dinov3(shapes):
    """The layers without a module around them."""
    return {name.replace("model.layer.", "layer."): shape for name, shape in shapes.items()}


def older_ast(shapes):
    """Names from before transformers 5, in a class for classification."""
    parts = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    parts |= {"o_proj": "output.dense"}
    renamed = {}
    for name, shape in shapes.items():
        name = re.sub(r"\b[qkvo]_proj\b", lambda match: parts[match[0]], name)
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        renamed[re.sub(r"\blayers\.", "encoder.layer.", name)] = shape
    return renamed


def older_waves(shapes):
    """Weight normalisation as PyTorch 1 named it."""
    names = {"parametrizations.weight.original0": "weight_g"}
    names["parametrizations.weight.original1"] = "weight_v"
    pattern = "|".join(map(re.escape, names))
    return {re.sub(pattern, lambda match: names[match[0]], name): x for name, x in shapes.items()}


def same(shapes):
    return shapes


CASES = [
    ("siglip", "SigLIP-B/16-224", "SiglipModel", "SiglipConfig", {}, same),
    ("siglip_text", "SigLIP-B", "SiglipModel", "SiglipConfig", {}, same),
    ("dinov2", "DINOv2-B/14", "Dinov2Model", "Dinov2Config", {},
     older_dinov2),
    ("dinov2", "DINOv2-g/14", "Dinov2Model", "Dinov2Config", GIANT | {"use_swiglu_ffn": True},
     older_dinov2),
    ("dinov2", "DINOv2-B/14-registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
     {"patch_size": 14}, older_dinov2),
    ("dinov3", "DINOv3-S/16", "DINOv3ViTModel", "DINOv3ViTConfig", DINOV3, older_dinov3),
    ("dinov3", "DINOv3-S+/16", "DINOv3ViTModel", "DINOv3ViTConfig",
     DINOV3 | {"use_gated_mlp": True}, older_dinov3),
    ("wav2vec2", "wav2vec2-base", "Wav2Vec2ForPreTraining", "Wav2Vec2Config",
     {}, older_waves),
    ("wav2vec2", "wav2vec2-large-lv60", "Wav2Vec2Model", "Wav2Vec2Config",
     LARGE | STABLE | {"conv_bias": True}, older_waves),
    ("hubert", "HuBERT-base", "HubertForCTC", "HubertConfig", {},
     older_waves),
    ("wavlm", "WavLM-base", "WavLMModel", "WavLMConfig", {}, older_waves),
    ("ast", "AST-B/10", "ASTForAudioClassification", "ASTConfig", {}, older_ast),
    ("ast", "AST-B-speech-commands", "ASTModel", "ASTConfig", {"max_length": 128}, older_ast),
    ("wavlm", "WavLM-large", "WavLMModel", "WavLMConfig", LARGE | STABLE, older_waves),
]  # fmt: skip


@pytest.mark.parametrize(
    ("encoder", "preset", "kind", "config", "sizes", "older"), CASES, ids=[c[1] for c in CASES]
)
def test_a_published_file_fits_its_preset(encoder, preset, kind, config, sizes, older):
    """All layers, in stacked leaves; leaves that are apart go by the same names, two are enough."""
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    tower = TowerConfig(encoder, preset, head="none")
    settings = tower.encoder_settings()
    width = getattr(settings, "projection", 0) or settings.width
    stacked = abstract(dataclasses.replace(tower, scan_layers=True), width)[1]
    apart = abstract(dataclasses.replace(tower, overrides={"depth": 2}), width)[1]
    for leaves, names in (
        (stacked, shapes), (stacked, older(shapes)), (apart, first_two(shapes)),
        (apart, first_two(older(shapes))),
    ):  # fmt: skip
        layouts = ENCODERS[encoder].layouts
        file = NamesOnly({name: Entry(x, np.dtype(np.float32)) for name, x in names.items()})
        fitting = [x for x in layouts if any(re.fullmatch(x.signature, n) for n in names)]
        plan = make_plan(fitting[0].view(file), fitting[0], leaves)
        assert len(plan.assignments) == len(leaves)
        assert plan.initialised == ()
        known = "mask|quantizer|project_|lm_head|logit_|text_model|vision_model|classifier"
        assert all(re.search(known, name) for name in plan.ignored)


def first_two(shapes):
    """A file cut to two layers."""
    return {
        name: shape
        for name, shape in shapes.items()
        if not (layer := re.search(r"\blayers?\.(\d+)\.", name)) or int(layer[1]) < 2
    }
