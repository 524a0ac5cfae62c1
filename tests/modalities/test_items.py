"""One item or many of what a caller has, and one sentence for what cannot be used."""

import io
import math

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities import ImageInputs, SpeechInputs, TextInputs
from cwcl_jax.modalities.image import eval_pixels, open_picture
from cwcl_jax.modalities.speech import open_recording

TONE = 0.3 * np.sin(np.arange(800) * 0.2).astype(np.float32)
INTEGERS = np.rint(TONE * 32767).astype(np.int16)


def test_a_tuple_is_many_items_unless_it_is_samples_and_their_rate():
    assert TextInputs().listed(("a star", "two stars")) == ["a star", "two stars"]
    assert TextInputs().listed("a star") == ["a star"]
    assert ImageInputs().listed(("a.png", "b.png")) == ["a.png", "b.png"]
    assert SpeechInputs().listed(("a.wav", "b.wav")) == ["a.wav", "b.wav"]
    assert len(SpeechInputs().listed((TONE, 16000))) == 1
    assert len(SpeechInputs().listed(((TONE, 16000), (TONE, np.int64(8000))))) == 2


def test_arrays_of_pictures_are_numpys_or_jaxs():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    for array in (pixels, jnp.asarray(pixels)):
        assert len(ImageInputs().listed(array[0])) == 1
        for one, expected in zip(ImageInputs().listed(array), pixels, strict=True):
            np.testing.assert_array_equal(np.asarray(open_picture(one)), expected)
    np.testing.assert_array_equal(np.asarray(open_picture(jnp.asarray(pixels[1]))), pixels[1])


def test_the_callers_own_jpeg_keeps_its_size():
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    picture = Image.open(file)
    eval_pixels(open_picture(picture), ImageInputs(size=32))
    assert picture.size == (800, 600)
    expected = np.asarray(Image.open(io.BytesIO(file.getvalue())))
    np.testing.assert_array_equal(np.asarray(picture), expected)


def test_samples_of_every_accepted_form_are_the_same_recording():
    stereo = np.stack([TONE, TONE], axis=1)
    for samples in (TONE, TONE.astype(np.float64), stereo, INTEGERS, jnp.asarray(TONE)):
        made, rate = open_recording((samples, 16000))
        assert (made.dtype, rate) == (np.int16, 16000)
        np.testing.assert_array_equal(made, INTEGERS)
    halves, _ = open_recording((TONE.astype(np.float16), 16000))
    np.testing.assert_allclose(halves, INTEGERS, atol=8)  # float16 has 11 bits
    loud, _ = open_recording((np.array([1.2, -1.2], np.float16), 16000))
    np.testing.assert_array_equal(loud, [32767, -32767])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (TONE[None], r"\(n, channels\), not \(1, 800\).*transpose"),
        (TONE[None, None], r"not \(1, 1, 800\)"),
        (INTEGERS.astype(np.int32), "int16 or floats.*not int32"),
        (INTEGERS.astype(np.float32), r"samples reach 9[\d.]+: floats are finite and in"),
        (np.array([0.1, math.nan], np.float32), "samples reach nan"),
        (np.array([0.1, -math.inf], np.float32), "samples reach inf"),
    ],
    ids=["channels first", "three axes", "int32", "16 bits as floats", "nan", "inf"],
)
def test_samples_that_would_become_another_sound_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        open_recording((samples, 16000))


def test_items_of_other_kinds_are_refused_in_words():
    with pytest.raises(ValueError, match="item 1 of the texts is None"):
        TextInputs().listed(["a star", None])
    with pytest.raises(ValueError, match=r"a picture is a path.* not int"):
        open_picture(3)
    with pytest.raises(ValueError, match=r"a recording is a path.* not ndarray"):
        open_recording(TONE)
    with pytest.raises(ValueError, match="samples a second, not 0"):
        open_recording((TONE, 0))


def test_an_error_names_the_path_or_the_number_of_the_item(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")

    inputs = ImageInputs(size=8)
    with pytest.raises(BadExample, match=r"image unreadable: .*bad\.png: none of JPEG") as caught:
        inputs.batch([tmp_path / "bad.png"], first=0)
    assert caught.value.kind == "image unreadable"
    good = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(BadExample, match="item 65: none of JPEG"):
        inputs.batch([good, b"no picture"], first=64)
    with pytest.raises(ValueError, match="item 1: an image array is uint8"):
        inputs.batch([good, good[..., 0]], first=0)
    cut = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        cut, "JPEG"
    )
    with pytest.raises(BadExample, match=r"image unreadable: item 0: .*truncated"):
        inputs.batch([Image.open(io.BytesIO(cut.getvalue()[:2000]))], first=0)
