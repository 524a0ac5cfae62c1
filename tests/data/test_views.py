"""What training draws of an example is one of a list, chosen by its first number alone."""

import io

import numpy as np
import pytest
from PIL import Image

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.views import drawn_input, every_input, kept_draws
from cwcl_jax.modalities import ImageInputs, SpeechInputs, TextInputs
from cwcl_jax.modalities.base import prepared


def picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


RECORDING = (np.random.default_rng(0).integers(-999, 999, 32_000).astype(np.int16), 16_000)
CASES = [
    (TextInputs(), ["a star", " ", "a red star", "something"], 3),
    (TextInputs(), "one alone", 1),
    (ImageInputs(size=16, crop_min_area=0.5, flip=True, views=4), picture(), 4),
    (SpeechInputs(max_seconds=0.5, views=3), RECORDING, 3),
]


@pytest.mark.parametrize(("inputs", "value", "count"), CASES)
def test_training_draws_one_of_the_list_by_its_first_number(inputs, value, count):
    every = every_input("tower", inputs, value, "id")
    assert len(every) == count
    np.testing.assert_equal(every[0], prepared(inputs, value))
    for key in range(20):
        drawn = drawn_input("tower", inputs, value, "id", Draws(key))
        np.testing.assert_equal(drawn, every[Draws(key).below(count)])
    np.testing.assert_equal(drawn_input("tower", inputs, value, "id", None), every[0])


def test_views_differ_from_each_other_and_go_by_example_and_tower():
    inputs, value = ImageInputs(size=16, crop_min_area=0.3, views=4), picture()
    made = [
        every_input(tower, inputs, value, name)
        for tower, name in (("image", "a"), ("image", "b"), ("picture", "a"))
    ]
    drawn = {view["pixels"].tobytes() for views in made for view in views[1:]}
    assert len(drawn) == 9
    assert kept_draws("image", inputs) != kept_draws("picture", inputs)


def test_without_a_number_of_views_the_draws_are_what_they_were():
    inputs, value = ImageInputs(size=16, crop_min_area=0.5, flip=True), picture()
    drawn = drawn_input("image", inputs, value, "id", Draws(3))
    np.testing.assert_equal(drawn, inputs.prepare(value, Draws(3)))
    assert "views" not in inputs.fingerprint()
    assert kept_draws("image", inputs) == {}


@pytest.mark.parametrize(
    "options", [{"views": 1, "flip": True}, {"views": -1, "flip": True}, {"views": 4}]
)
def test_views_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="views="):
        ImageInputs(**options)
