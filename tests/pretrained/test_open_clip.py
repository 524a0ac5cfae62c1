"""OpenCLIP's own layout, written from the numbers of a model of transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.models.encoders import encoder_config
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import complete
from cwcl_jax.weights.writers import write_safetensors
from tests.pretrained.against_torch import jitted, torch, unit
from tests.pretrained.test_clip import clip, imported, texts

CONFIG = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 16, "layers": 2, "width": 16, "patch_size": 4, "head_width": 4,
            "mlp_ratio": 2.25,
        },
        "text_cfg": {
            "context_length": 9, "vocab_size": 40, "width": 24, "heads": 4, "layers": 2,
            "mlp_ratio": 1.5,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]},
}  # fmt: skip


def written(model, folder, prefix=""):
    """The file that OpenCLIP would write for the same numbers."""
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    arrays = {"logit_scale": state["logit_scale"]}
    arrays["visual.proj"] = state["visual_projection.weight"].T
    arrays[f"{prefix}text_projection"] = state["text_projection.weight"].T
    parts = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "text_model.embeddings.token_embedding.weight": f"{prefix}token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": f"{prefix}positional_embedding",
    }
    for kind in ("weight", "bias"):
        parts[f"vision_model.pre_layrnorm.{kind}"] = f"visual.ln_pre.{kind}"
        parts[f"vision_model.post_layernorm.{kind}"] = f"visual.ln_post.{kind}"
        parts[f"text_model.final_layer_norm.{kind}"] = f"{prefix}ln_final.{kind}"
        for tower, start in (("vision_model", "visual."), ("text_model", prefix)):
            for layer in range(2):
                theirs = f"{tower}.encoder.layers.{layer}"
                ours = f"{start}transformer.resblocks.{layer}"
                joined = [state[f"{theirs}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                arrays[f"{ours}.attn.in_proj_{kind}"] = np.concatenate(joined)
                for one, other in (
                    ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                ):  # fmt: skip
                    parts[f"{theirs}.{one}.{kind}"] = f"{ours}.{other}.{kind}"
    arrays |= {new: state[old] for old, new in parts.items()}
    folder.mkdir()
    write_safetensors(folder / "open_clip_model.safetensors", arrays)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))


@pytest.mark.parametrize("prefix", ["", "text."])
def test_both_towers_of_openclips_file_equal_pytorch(tmp_path, prefix):
    model = clip(tmp_path / "hf", act="gelu")
    written(model, tmp_path / "own", prefix)
    tower, result = imported("text", tmp_path / "own")
    assert result.initialised == ()
    tokens, mask = texts()
    with torch.no_grad():
        theirs = model.text_projection(
            model.text_model(input_ids=torch.tensor(tokens)).pooler_output
        )
    inputs = {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.asarray(mask)}
    np.testing.assert_allclose(jitted(tower, inputs), unit(theirs), atol=1e-5)
    tower, result = imported("vit", tmp_path / "own")
    assert result.initialised == ()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    asked = CONFIG["preprocess_cfg"]
    plain = (pixels / 255 - asked["mean"]) / asked["std"]
    plain = torch.tensor(plain.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        out = model.vision_model(pixel_values=plain)
        theirs = model.visual_projection(out.pooler_output)
    ours = jitted(tower, {"pixels": jnp.asarray(pixels)})
    np.testing.assert_allclose(ours, unit(theirs), atol=1e-5)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"hf_model_name": "roberta-base"}),
    ],
)
def test_models_that_are_no_clip_are_refused_by_name(tmp_path, part, change):
    content = json.loads(json.dumps(CONFIG))
    content["model_cfg"][part] |= change
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    encoder = "vit" if part == "vision_cfg" else "text"
    with pytest.raises(ValueError, match=r"open_clip_config.json: model_cfg.* not supported"):
        complete(TowerConfig(encoder, weights=str(tmp_path)))


def test_the_activation_is_said_by_the_file(tmp_path):
    content = json.loads(json.dumps(CONFIG))
    content["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    config = complete(TowerConfig("text", weights=str(tmp_path)))
    settings = encoder_config("text", "", config.overrides, "")
    assert (settings.activation, settings.max_tokens) == ("quick_gelu", 9)
