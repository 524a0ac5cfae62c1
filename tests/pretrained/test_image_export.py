"""An image tower leaves as a folder of transformers: class, processor, embeds; and comes back."""

import numpy as np
import pytest
import yaml

from cwcl_jax.export import export
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained.folder import below
from cwcl_jax.pretrained.image_folder import opened_as
from cwcl_jax.pretrained.model_card import write_card
from tests.pretrained.against_torch import close, imported, torch, transformers, unit
from tests.pretrained.test_clip_export import VISION, pair
from tests.test_api import pictures

SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "image_size": 16, "patch_size": 4}
# Without a head the features are as wide as the other tower's embeds.
PLAIN = SIZES | {"width": 8}
GATED = SIZES | {"gated": True, "activation": "silu", "mlp_width": 24}
TOWERS = {
    "ViT": TowerConfig("vit", overrides=SIZES | {"mlp_width": 24}, scan_layers=True),
    "CLIP": VISION,
    "SigLIP": TowerConfig("siglip", overrides=PLAIN, head="none"),
    "DINOv2": TowerConfig("dinov2", overrides=PLAIN, head="none"),
    "DINOv2, mean and head": TowerConfig(
        "dinov2", overrides=GATED | {"registers": 3, "mlp_width": 48}, pooling="mean"
    ),
    "DINOv3": TowerConfig("dinov3", overrides=GATED | {"registers": 2, "width": 8}, head="none"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_transformers_gives_the_embeds_and_the_importer_the_leaves(tmp_path, name):
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    tower = TOWERS[name]
    two = pair(image=tower)
    export(two, tmp_path, "image")
    kind, output = opened_as(two.description)
    opened, report = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        out = opened.eval()(**processor(pictures(), return_tensors="pt"))
    close(f"export {name}", two.encode_image(pictures()), unit(getattr(out, output)))
    changes = {"pooling": tower.pooling} if tower.pooling else {}
    _, result = imported(tower.encoder, tmp_path, tower.encoder_settings().width, **changes)
    ours = below(two.leaves, "image")
    for path, leaf in result.leaves.items():
        np.testing.assert_array_equal(leaf, ours[path.removeprefix("towers/x/")], err_msg=path)


def test_the_card_shows_the_call(tmp_path):
    two = pair(image=TOWERS["CLIP"])
    write_card(tmp_path / "README.md", two.description, "image", name="mine")
    text = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "image-feature-extraction"
    assert 'CLIPVisionModelWithProjection.from_pretrained("mine")' in text
    assert "normalize(outputs.image_embeds)" in text
    assert "holds the image tower alone" in text


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (TowerConfig("vit", overrides=SIZES, pooling="mean"), "ViTModel has no pooling 'mean'"),
        (TowerConfig("siglip", overrides=SIZES), "SiglipVisionModel has no head"),
        (TowerConfig("dinov3", overrides=SIZES | {"heads": 4}), "DINOv3ViTModel has no head"),
        (TowerConfig("vit", overrides=SIZES, head="mlp"), "head='mlp' fits no class"),
        (TowerConfig("dinov2", overrides=SIZES | {"mlp_width": 24}), "mlp_width=24 is no multiple"),
    ],
)
def test_what_no_class_computes_is_refused(tmp_path, tower, message):
    with pytest.raises(ValueError, match=message):
        export(pair(image=tower), tmp_path / "out", "image")
    assert not (tmp_path / "out").exists()
