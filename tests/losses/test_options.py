import dataclasses

import pytest

from cwcl_jax.losses import LossConfig
from cwcl_jax.losses.options import check_weight_gradient, resolve


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "clip"),
        ("weight_function", "cosine"),
        ("weighted", "none"),
        ("direction", "u"),
        ("reduction", "max"),
        ("duplicates", "drop"),
        ("form", "tiled"),
        ("precision", "tf32"),
        ("weight_temperature", 0.0),
        ("weight_power", float("inf")),
        ("target_diagonal", 1.0),
        ("target_positives", 0.5),
        ("reverse_weight", -1.0),
        ("row_sum_epsilon", float("nan")),
        ("block_size", -1),
        ("block_columns", -1),
        ("sampled_rows", 0),
    ],
)
def test_a_bad_option_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        LossConfig(**{field: value})


def test_a_preset_decides_its_fields_and_leaves_the_others():
    config = resolve(LossConfig(name="astroclip", weight_temperature=0.2, reverse_weight=3.0))
    assert (config.weight_function, config.reduction) == ("exp", "mean")
    assert (config.weight_temperature, config.reverse_weight) == (0.2, 3.0)


def test_a_field_against_the_preset_is_an_error():
    with pytest.raises(
        ValueError, match="weight_function='relu' contradicts the preset 'cellclip'"
    ):
        resolve(LossConfig(name="cellclip", weight_function="relu"))


WITH_GRADIENT = {"name": "cwcl", "detach_weights": False}


@pytest.mark.parametrize("name", ["cwcl", "uniform", "contrastive", "sigmoid"])
def test_a_gradient_of_the_weights_that_is_there_or_cannot_be_is_no_error(name):
    check_weight_gradient(resolve(LossConfig(name=name, detach_weights=False)))


@pytest.mark.parametrize("duplicates", ["positives", "masked"])
@pytest.mark.parametrize("options", [{"name": "cellclip"}, WITH_GRADIENT])
def test_a_gradient_of_weights_that_duplicates_change_is_an_error(options, duplicates):
    config = resolve(LossConfig(duplicates=duplicates, **options))
    with pytest.raises(ValueError, match=f"duplicates='{duplicates}'.*form='dense'"):
        check_weight_gradient(config)
    check_weight_gradient(dataclasses.replace(config, form="dense"))
    check_weight_gradient(dataclasses.replace(config, weight_function="labels"))
