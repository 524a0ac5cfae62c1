"""AugReg `.npz` files: names and shapes of the published ones, round trip, grids, and misfits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.models.vit import PRESETS, VitConfig
from cwcl_jax.pretrained import WeightsMismatch, folder, import_tower, write_augreg_npz
from cwcl_jax.pretrained.augreg_npz import augreg_arrays
from cwcl_jax.pretrained.importer import recognise
from cwcl_jax.weights.readers import Entry
from cwcl_jax.weights.rules import TRANSFORMS, make_plan
from tests.models.builders import abstract_two, two_towers

SIZES = {"image_size": 24, "patch_size": 8, "width": 12, "depth": 2, "heads": 3, "mlp_width": 20}


def model(abstract=False, **changes):
    options = {"overrides": SIZES, "head": "linear"} | changes
    configs = {
        "image": TowerConfig("vit", **options),
        "text": TowerConfig("precomputed", overrides={"width": 8}, head="none"),
    }

    return configs["image"], *(abstract_two if abstract else two_towers)(configs)


def below(leaves):
    return {p.removeprefix("towers/image/"): x for p, x in leaves.items() if "/image/" in p}


def augreg_shapes(width, depth, heads, mlp, tokens, patch, classes):
    """Names and shapes of a published AugReg file, written down independently of the exporter."""
    k = width // heads
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, tokens, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (width, heads, k)
            shapes[f"{attention}/{part}/bias"] = (heads, k)
        shapes |= {f"{attention}/out/kernel": (heads, k, width), f"{attention}/out/bias": (width,)}
        shapes |= {
            f"{block}/MlpBlock_3/Dense_0/kernel": (width, mlp),
            f"{block}/MlpBlock_3/Dense_0/bias": (mlp,),
            f"{block}/MlpBlock_3/Dense_1/kernel": (mlp, width),
            f"{block}/MlpBlock_3/Dense_1/bias": (width,),
        }
    return shapes


class Shapes:
    """A file of which only names and shapes exist."""

    source = "L_16.npz"

    def __init__(self, shapes):
        self.entries = {name: Entry(shape, np.dtype(np.float32)) for name, shape in shapes.items()}

    def read(self, name):
        raise AssertionError(f"planning must not read {name}")


@pytest.mark.parametrize("scan", [False, True])
def test_published_names_and_shapes_of_vit_l16_fit_without_reading_anything(scan):
    shapes = augreg_shapes(1024, 24, 16, 4096, 197, 16, 21843)
    assert len(shapes) == 392
    _, _, leaves = model(abstract=True, preset="ViT-L/16", overrides={}, scan_layers=scan)
    weights = Shapes(shapes)
    family = recognise(weights, "vit", "image")
    plan = make_plan(family.view(weights), family, below(leaves))
    assert {a.target for a in plan.assignments} == set(below(leaves)) - {"head/projection/kernel"}
    assert plan.initialised == ("head/projection/kernel",)
    assert set(plan.ignored) == {"head/kernel", "head/bias"}


def test_exporter_writes_exactly_the_published_names_and_shapes():
    """Of the first twelve layers of a ViT-L/16, whose names have one digit and two."""
    config = dataclasses.replace(PRESETS["ViT-L/16"], depth=12)
    _, _, leaves = model(abstract=True, preset="ViT-L/16", overrides={"depth": 12})
    stand_ins = {p: np.broadcast_to(np.float32(0), x.shape) for p, x in below(leaves).items()}
    written = {name: x.shape for name, x in augreg_arrays(config, stand_ins).items()}
    assert written == augreg_shapes(1024, 12, 16, 4096, 197, 16, 8)


@pytest.mark.parametrize("scan", [False, True])
def test_round_trip_is_exact(tmp_path, scan):
    config, _, leaves = model(scan_layers=scan)
    path = tmp_path / "vit.npz"
    write_augreg_npz(path, VitConfig(**SIZES), folder.below(leaves, "image"))
    config, _, abstract = model(abstract=True, weights=str(path), scan_layers=True)
    imported = import_tower(config, "image", abstract)
    assert len(imported.sha256) == 64
    assert imported.initialised == ()
    assert set(imported.leaves) == {p for p in abstract if "/image/" in p}
    for path, array in imported.leaves.items():
        expected = leaves.get(path)
        if expected is None:
            tail = path.removeprefix("towers/image/encoder/blocks/")
            expected = jnp.stack(
                [leaves[f"towers/image/encoder/blocks/{i}/{tail}"] for i in (0, 1)]
            )
        np.testing.assert_array_equal(array, expected)


def test_names_of_newer_files_and_layers_in_one_array_are_read(tmp_path):
    config, _, leaves = model()
    arrays = augreg_arrays(VitConfig(**SIZES), below(leaves))
    renamed = {}
    for name, array in arrays.items():
        name = name.replace("Attention_1", "Attention_0").replace("MlpBlock_3", "MlpBlock_0")
        name = name.replace("LayerNorm_2", "LayerNorm_1").replace("Transformer/posembed_input/", "")
        renamed[f"params/img/{name}"] = array
    stacked = {k: v for k, v in renamed.items() if "encoderblock" not in k}
    for name in {k for k in renamed if "encoderblock_0" in k}:
        layers = [renamed[name.replace("block_0", f"block_{i}")] for i in range(2)]
        stacked[name.replace("block_0", "block")] = np.stack(layers)
    stacked["params/t"] = np.zeros(1, np.float32)
    for number, content in enumerate((renamed, stacked)):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **content)
        config, _, abstract = model(abstract=True, weights=str(path))
        imported = import_tower(config, "image", abstract)
        for name, array in imported.leaves.items():
            np.testing.assert_array_equal(array, leaves[name])


def test_position_grid_is_resampled_as_big_vision_does():
    rng = np.random.default_rng(0)
    for old, new in ((3, 5), (4, 2), (6, 6)):
        table = rng.normal(size=(1, 1 + old**2, 4)).astype(np.float32)
        grid = table[0, 1:].reshape(old, old, 4)
        zoomed = scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1)
        got = TRANSFORMS["grid"](table, (1, 1 + new**2, 4))
        np.testing.assert_array_equal(got[:, :1], table[:, :1])
        np.testing.assert_allclose(got[0, 1:].reshape(new, new, 4), zoomed, atol=1e-6)


def test_another_image_size_imports_and_runs(tmp_path):
    _, _, leaves = model()
    path = tmp_path / "vit.npz"
    write_augreg_npz(path, VitConfig(**SIZES), below(leaves))
    config, definition, abstract = model(weights=str(path), overrides=SIZES | {"image_size": 40})
    imported = import_tower(config, "image", abstract)
    tower = definition.merge(abstract | imported.leaves).towers["image"]
    shape = jax.eval_shape(tower, {"pixels": jnp.zeros((1, 40, 40, 3), jnp.uint8)}).shape
    assert shape == (1, 8)


def test_half_precision_files_and_leaves_are_cast(tmp_path):
    _, _, leaves = model()
    path = tmp_path / "vit.npz"
    write_augreg_npz(path, VitConfig(**SIZES), below(leaves), dtype=np.float16)
    config, _, abstract = model(abstract=True, weights=str(path))
    abstract = {p: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for p, x in abstract.items()}
    imported = import_tower(config, "image", abstract)
    name = "towers/image/encoder/blocks/0/mlp/up/kernel"
    assert imported.leaves[name].dtype == jnp.bfloat16
    np.testing.assert_allclose(imported.leaves[name].astype(jnp.float32), leaves[name], atol=4e-3)


def damaged(arrays):
    yield "size", arrays | {"cls": np.zeros((1, 1, 7), np.float32)}
    yield "missing", {k: v for k, v in arrays.items() if k != "cls"}
    yield "unexpected", arrays | {"Transformer/encoderblock_2/LayerNorm_0/scale": arrays["cls"]}
    yield "type", arrays | {"cls": np.zeros((1, 1, 12), np.int64)}


def test_misfits_name_the_file_the_lists_and_the_remedy(tmp_path):
    _, _, leaves = model()
    arrays = augreg_arrays(VitConfig(**SIZES), below(leaves))
    messages = {}
    for kind, content in damaged(arrays):
        path = tmp_path / f"{kind}.npz"
        np.savez(path, **content)
        config, _, abstract = model(abstract=True, weights=str(path))
        placed = []
        with pytest.raises(WeightsMismatch, match=f"{kind}.npz") as caught:
            import_tower(config, "image", abstract, put=lambda p, x, seen=placed: seen.append(p))
        assert not placed, "nothing may be placed before everything is checked"
        messages[kind] = caught.value
    assert "cls (shape (1, 1, 7), expected (1, 1, 12))" in messages["size"].wrong[0]
    assert "preset" in str(messages["size"])
    assert messages["missing"].missing == ("encoder/class_token",)
    assert messages["unexpected"].unexpected == ("Transformer/encoderblock_2/LayerNorm_0/scale",)
    assert "int64, expected floating point" in messages["type"].wrong[0]


def test_packaged_files_and_missing_paths_are_named(tmp_path):
    config, _, abstract = model(abstract=True, weights=str(tmp_path / "none.npz"))
    with pytest.raises(FileNotFoundError, match=r"none.npz.*no such file"):
        import_tower(config, "image", abstract)
    config, _, abstract = model(abstract=True, weights="package:none.npz")
    with pytest.raises(FileNotFoundError, match=r"no file 'none.npz' among its assets"):
        import_tower(config, "image", abstract)
