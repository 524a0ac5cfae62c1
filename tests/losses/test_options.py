import dataclasses

import pytest

from cwcl_jax.losses import LossConfig
from cwcl_jax.losses.options import resolve
from cwcl_jax.losses.presets import PRESETS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "clip"),
        ("weight_function", "cosine"),
        ("weight_function", "affine2"),
        ("weight_function", "relu2_3"),
        ("weight_function", "exp0"),
        ("weight_function", "calibrated1"),
        ("weight_function", "labels1.5"),
        ("weighted", "none"),
        ("direction_weights", (1.0,)),
        ("direction_weights", (0.0, 0.0)),
        ("direction_weights", (1.0, float("nan"))),
        ("duplicates", "drop"),
        ("duplicates", "absolute"),
        ("duplicates", "absolute1.5"),
        ("duplicates", "masked0.5"),
        ("mix", (0.5, 1.5)),
        ("terms", ("cosine",)),
        ("terms", ("cosine=-1",)),
        ("terms", ("cosine=1", "cosine=2")),
        ("terms", ("uniformity=1",)),
        ("form", "tiled"),
        ("precision", "tf32"),
        ("block_size", -1),
        ("block_columns", -1),
    ],
)
def test_a_bad_option_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        LossConfig(**{field: value})


def test_a_preset_decides_its_fields_and_leaves_the_others():
    frame = resolve(LossConfig(name="xclr", weight_function="exp0.2", direction_weights=(0.5, 0.5)))
    assert (frame.weights.numbers, frame.weighted) == ((0.2,), "both")
    assert frame.direction_weights == (0.5, 0.5)
    assert resolve(LossConfig(name="cellclip")).detach_weights is False
    assert resolve(LossConfig(name="cellclip", detach_weights=True)).detach_weights is True


def test_a_field_against_the_preset_is_an_error():
    with pytest.raises(
        ValueError, match=r"weight_function='relu' contradicts the preset 'cellclip'.*cwcl"
    ):
        LossConfig(name="cellclip", weight_function="relu")
    assert LossConfig(name="cellclip", weight_function="affine")


@pytest.mark.parametrize("option", [{"weighted": "u_to_v"}, {"direction_weights": (0.5, 0.5)}])
def test_a_sigmoid_loss_has_no_directions(option):
    with pytest.raises(ValueError, match="contradicts the preset 'sigmoid'"):
        LossConfig(name="sigmoid", **option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighted": "own", "weight_function": "labels"}, "no similarities of features"),
        ({"weight_function": "uniform", "detach_weights": True}, "detach_weights has no effect"),
        ({"name": "contrastive", "terms": ("negatives=1",)}, "its negatives have no targets"),
        ({"name": "supervised", "duplicates": "positives"}, "duplicates='positives' has no effect"),
        ({"name": "regression", "terms": ("cosine=0",)}, "computes no loss"),
        ({"weight_function": "calibrated", "duplicates": "absolute0.1"}, "cannot be combined with"),
    ],
)
def test_an_option_that_would_do_nothing_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


@pytest.mark.parametrize("duplicates", ["positives", "masked", "relative0.1"])
@pytest.mark.parametrize("name", ["cellclip", "cwcl"])
def test_a_gradient_of_weights_that_duplicates_change_is_an_error(name, duplicates):
    options = {"name": name, "duplicates": duplicates, "detach_weights": False}
    with pytest.raises(ValueError, match=r"duplicates=.*form='dense'"):
        LossConfig(**options)
    LossConfig(**options, form="dense")


def test_every_preset_names_its_source_and_resolves():
    for name, preset in PRESETS.items():
        assert resolve(LossConfig(name=name)).kind == preset.kind
        assert len(preset.source) > 20
        fields = {field.name for field in dataclasses.fields(LossConfig)}
        assert set(preset.open) <= fields
