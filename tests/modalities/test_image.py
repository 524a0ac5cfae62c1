import contextlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities import ImageInputs
from cwcl_jax.modalities.image import (
    decode_rgb,
    eval_pixels,
    open_image,
    random_crop_box,
    train_pixels,
)
from tests.data.making import encoded, jpeg, pixels

SQUARE = pixels(3, 32, 32)


def _decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(open_image(data, 10**9)))


def test_rgb_png_comes_back_exactly():
    np.testing.assert_array_equal(_decoded(encoded(Image.fromarray(SQUARE))), SQUARE)


def test_palette_pictures_show_their_colours():
    palette = Image.fromarray(SQUARE).quantize(64)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(_decoded(encoded(palette)), expected)
    np.testing.assert_array_equal(_decoded(encoded(palette, "GIF")), expected)


def test_transparent_parts_become_white():
    rgba = np.dstack([SQUARE, np.full((32, 32), 255, np.uint8)])
    rgba[:8, :8] = (10, 200, 30, 0)
    seen = _decoded(encoded(Image.fromarray(rgba)))
    assert (seen[:8, :8] == 255).all()
    np.testing.assert_array_equal(seen[8:], SQUARE[8:])


def test_a_transparent_palette_colour_becomes_white():
    palette = Image.fromarray(np.zeros((8, 8), np.uint8), "P")
    palette.putpalette([200, 10, 10] * 256)
    assert (_decoded(encoded(palette, transparency=0)) == 255).all()
    assert (_decoded(encoded(palette)) == (200, 10, 10)).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_one_transparent_colour_becomes_white(mode):
    wide = SQUARE[:, :, 0].astype(np.uint16) * 257
    values = {"RGB": SQUARE, "L": SQUARE[:, :, 0], "I;16": wide}[mode].copy()
    values[:8] = values[0, 0]
    clear = values[0, 0].tolist()
    clear = tuple(clear) if isinstance(clear, list) else clear
    here = values == values[0, 0] if mode != "RGB" else (values == values[0, 0]).all(axis=-1)
    opaque = _decoded(encoded(Image.fromarray(values)))
    seen = _decoded(encoded(Image.fromarray(values), transparency=clear))
    assert not (opaque[here] == 255).any()
    np.testing.assert_array_equal(seen, np.where(here[:, :, None], np.uint8(255), opaque))


def test_cmyk_jpegs_keep_their_colours():
    cmyk = Image.fromarray(SQUARE).convert("CMYK")
    seen = _decoded(encoded(cmyk, "JPEG", quality=95)).astype(int)
    assert np.abs(seen - SQUARE).mean() < 8


def test_grey_and_two_channel_pictures_become_rgb():
    grey = SQUARE[:, :, 0]
    np.testing.assert_array_equal(_decoded(encoded(Image.fromarray(grey)))[:, :, 2], grey)
    alpha = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (32, 32), 255)])
    np.testing.assert_array_equal(_decoded(encoded(alpha))[:, :, 1], grey)


def test_sixteen_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    seen = _decoded(encoded(Image.fromarray(ramp)))
    assert seen.min() == 0
    assert seen.max() == 255
    assert np.abs(seen[:, :, 0].astype(float) - ramp / 257).max() <= 1


@pytest.mark.parametrize("full", [1.0, 255.0, 65535.0, 1e6])
def test_float_pictures_have_the_scale_of_their_values(full):
    grey = SQUARE[:, :, 0].copy()
    grey[0, 0] = 255
    for kind in (np.float32, np.int32)[: 1 if full == 1 else 2]:
        # Rounded up by a hair: what is stored must not fall below its level.
        stored = (grey.astype(np.float64) / 255 * full + 1e-6 * full * (grey < 255)).astype(kind)
        seen = _decoded(encoded(Image.fromarray(stored), "TIFF"))
        assert np.abs(seen[:, :, 0].astype(int) - grey).max() <= 1


def test_float_pictures_that_hold_no_numbers_are_bad_examples():
    data = encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")
    with pytest.raises(BadExample, match="not numbers"):
        eval_pixels(data, ImageInputs(size=8))


def _stored(upright: np.ndarray, orientation: int) -> Image.Image:
    """The picture that, turned as the tag says, is `upright`."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    return Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))


def _with_orientation(upright: np.ndarray, orientation: int) -> bytes:
    """A JPEG whose stored pixels, turned as the tag says, are `upright`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = _stored(upright, orientation)
    return encoded(image, "JPEG", quality=95, subsampling=0, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotations_are_undone_before_the_crop(orientation):
    upright = pixels(5, 96, 128)
    inputs = ImageInputs(size=32, eval_resize=40)
    seen = eval_pixels(_with_orientation(upright, orientation), inputs).astype(int)
    expected = eval_pixels(Image.fromarray(upright), inputs)
    assert np.abs(seen - expected).mean() < 2
    box_draws = Draws(1), Draws(1)
    random = ImageInputs(size=32, crop_min_area=0.3)
    one = train_pixels(_with_orientation(upright, orientation), random, box_draws[0])
    two = train_pixels(Image.fromarray(upright), random, box_draws[1])
    assert np.abs(one.astype(int) - two).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "late"])
def test_rotations_are_undone_in_every_format(kind, orientation):
    upright = pixels(5, 32, 48)
    data = _turned(upright, orientation, "PNG" if kind == "late" else kind)
    data = _exif_last(data) if kind == "late" else data
    inputs = ImageInputs(size=24, crop_min_area=0.3)
    plain = encoded(Image.fromarray(upright))
    np.testing.assert_array_equal(eval_pixels(data, inputs), eval_pixels(plain, inputs))
    one, two = (train_pixels(d, inputs, Draws(2)) for d in (data, plain))
    np.testing.assert_array_equal(one, two)


def _turned(upright: np.ndarray, orientation: int, kind: str) -> bytes:
    """As `_with_orientation`, without loss."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = _stored(upright, orientation)
    if kind == "TIFF":
        return encoded(image, kind, tiffinfo={0x0112: orientation})
    return encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def _exif_last(png: bytes) -> bytes:
    """A PNG with its eXIf chunk behind the pixels."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]


def _exif(*tags: tuple[int, int, bytes]) -> bytes:
    """EXIF of tags (number, type, four bytes) as they are, right or wrong."""
    body = b"".join(struct.pack(">HHI", tag, kind, 1) + value for tag, kind, value in tags)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(tags)) + body + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbagegarbage",
        b"Exif\0\0MM\0*\0\0",
        _exif((0x0112, 3, b"\0\x63\0\0")),
        _exif((0x0112, 2, b"six\0")),
    ],
    ids=["noise", "cut off", "no such orientation", "a word"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_means_no_rotation(kind, exif):
    plain = encoded(Image.fromarray(SQUARE), kind)
    broken = encoded(Image.fromarray(SQUARE), kind, exif=exif)
    inputs = ImageInputs(size=24)
    np.testing.assert_array_equal(eval_pixels(broken, inputs), eval_pixels(plain, inputs))
    one, two = (train_pixels(d, inputs, Draws(0)) for d in (broken, plain))
    np.testing.assert_array_equal(one, two)


def test_tags_of_the_wrong_type_do_not_hinder_the_rotation():
    upright = pixels(5, 96, 128)
    # The second tag is a SHORT by the standard and stands here as a LONG that no SHORT can hold.
    exif = _exif((0x0112, 3, b"\0\6\0\0"), (0x0213, 4, b"\0\1\0\0"))
    data = encoded(_stored(upright, 6), "JPEG", quality=95, subsampling=0, exif=exif)
    inputs = ImageInputs(size=32)
    expected = eval_pixels(Image.fromarray(upright), inputs)
    assert np.abs(eval_pixels(data, inputs).astype(int) - expected).mean() < 2


def test_evaluation_resizes_the_shorter_side_and_cuts_the_centre():
    image = Image.fromarray(pixels(1, 60, 90))
    seen = eval_pixels(image, ImageInputs(size=28, eval_resize=32))
    resized = image.resize((48, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[2:30, 10:38]
    assert np.abs(seen.astype(int) - expected).max() <= 3


def test_a_picture_of_the_asked_size_is_left_alone():
    inputs = ImageInputs(size=32)
    np.testing.assert_array_equal(eval_pixels(Image.fromarray(SQUARE), inputs), SQUARE)
    np.testing.assert_array_equal(train_pixels(Image.fromarray(SQUARE), inputs, Draws(0)), SQUARE)


def test_the_scaled_decoder_sees_nearly_the_same_picture():
    big = pixels(2, 600, 800)
    data = encoded(Image.fromarray(big), "JPEG", quality=95)
    inputs = ImageInputs(size=64)
    scaled, whole = eval_pixels(data, inputs), eval_pixels(Image.fromarray(big), inputs)
    assert np.abs(scaled.astype(int) - whole).mean() < 2


def test_crops_stay_inside_and_cover_at_least_the_asked_area():
    draws = Draws(8)
    areas = []
    for _ in range(300):
        left, top, right, bottom = random_crop_box(100, 60, 0.25, draws)
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 60
        areas.append((right - left) * (bottom - top) / 6000)
        assert 0.74 < (right - left) / (bottom - top) < 1.34
    assert min(areas) >= 0.25 - 1e-6
    assert max(areas) > 0.75


def test_crop_and_flip_follow_the_draws():
    inputs = ImageInputs(size=16, crop_min_area=0.2, flip=True)
    image = Image.fromarray(SQUARE)
    first, second = train_pixels(image, inputs, Draws(1)), train_pixels(image, inputs, Draws(1))
    np.testing.assert_array_equal(first, second)
    assert len({train_pixels(image, inputs, Draws(k)).tobytes() for k in range(8)}) == 8


def test_half_of_the_pictures_are_mirrored():
    inputs = ImageInputs(size=32, flip=True)
    image = Image.fromarray(SQUARE)
    seen = [train_pixels(image, inputs, Draws(k)) for k in range(200)]
    mirrored = [np.array_equal(pixels_, SQUARE[:, ::-1]) for pixels_ in seen]
    same = [np.array_equal(pixels_, SQUARE) for pixels_ in seen]
    assert sum(mirrored) + sum(same) == 200
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize("height_width", [(1, 1), (1, 50), (50, 1)])
def test_tiny_pictures_are_enlarged(height_width):
    image = Image.fromarray(pixels(0, *height_width))
    for inputs in (ImageInputs(size=8), ImageInputs(size=8, crop_min_area=0.1, eval_resize=10)):
        assert eval_pixels(image, inputs).shape == (8, 8, 3)
        assert train_pixels(image, inputs, Draws(0)).shape == (8, 8, 3)


def _huge_png(width: int, height: int) -> bytes:
    """A PNG that claims to be huge: header alone, no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        sum_ = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", sum_)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [10_000, 16_000, 60_000])
def test_a_hundred_megapixels_are_refused_before_decoding(side):
    with pytest.raises(BadExample, match="too large") as caught:
        eval_pixels(_huge_png(side, side), ImageInputs())
    assert caught.value.kind == "image too large"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "image empty"),
        (b"not a picture", "image unreadable"),
        (jpeg()[:-200], "image unreadable"),
        (jpeg(0, 100, 100)[:600], "image unreadable"),
        (encoded(Image.fromarray(SQUARE))[:-40], "image unreadable"),
        (jpeg()[:20], "image unreadable"),
    ],
)
def test_broken_pictures_are_bad_examples(data, kind):
    for function in (eval_pixels, lambda d, i: train_pixels(d, i, Draws(0))):
        with pytest.raises(BadExample) as caught:
            function(data, ImageInputs())
        assert caught.value.kind == kind
        assert "0x" not in str(caught.value)  # reasons, not addresses of buffers


def test_formats_that_run_programs_are_not_opened():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
    with pytest.raises(BadExample, match="unreadable"):
        eval_pixels(program, ImageInputs(size=8))


def test_random_damage_never_ends_the_run():
    whole = bytearray(jpeg(4, 64, 64))
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(2, len(data), 8):
            data[place] = rng.integers(256)
        with contextlib.suppress(BadExample):
            assert eval_pixels(bytes(data), ImageInputs(size=16)).shape == (16, 16, 3)


def test_webp_and_other_formats_are_read():
    for kind in ("WEBP", "BMP", "TIFF", "GIF"):
        buffer = io.BytesIO()
        Image.fromarray(SQUARE).save(buffer, kind)
        assert eval_pixels(buffer.getvalue(), ImageInputs(size=16)).shape == (16, 16, 3)


@pytest.mark.parametrize("shape", [(48, 36), (36, 48), (49, 32), (33, 64)])
@pytest.mark.parametrize("resize", [0, 40])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_evaluation_cuts_as_the_folders_own_library_does(shape, resize, resample):
    """CLIP's processor, whose arithmetic is torchvision's but for halves of odd remainders."""
    transformers = pytest.importorskip("transformers")
    picture = Image.fromarray(pixels(5, *shape))
    inputs = ImageInputs(size=32, eval_resize=resize, resample=resample)
    theirs = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": resize or 32},
        crop_size={"height": 32, "width": 32},
        resample=Image.Resampling[resample.upper()],
        do_rescale=False,
        do_normalize=False,
    )(picture)["pixel_values"][0]
    ours = eval_pixels(picture, inputs)
    np.testing.assert_array_equal(ours, np.asarray(theirs).transpose(1, 2, 0))


def test_a_squashed_picture_is_whole():
    picture = Image.fromarray(pixels(5, 50, 37))
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
    inputs = ImageInputs(size=32, resample="bilinear", squash=True)
    np.testing.assert_array_equal(eval_pixels(picture, inputs), expected)


def test_a_file_and_the_picture_in_it_are_the_same():
    """Of a large JPEG the decoder would give a smaller one by itself."""
    noise = Image.fromarray(pixels(6, 400, 300))
    data = encoded(noise, "JPEG")
    opened = Image.open(io.BytesIO(data))
    for inputs in (ImageInputs(size=32), ImageInputs(size=32, squash=True)):
        np.testing.assert_array_equal(eval_pixels(data, inputs), eval_pixels(opened, inputs))


def test_the_processor_beside_weights_is_obeyed_or_its_options_are_named(tmp_path):
    """Google's ViT folders squash the picture, bilinearly."""
    vit = {"size": {"height": 224, "width": 224}, "resample": 2, "do_resize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(vit))
    with pytest.raises(ValueError, match=r"--config\.data\.image\.resample=bilinear .*squash=True"):
        ImageInputs(size=224).check_files(tmp_path, "config.data.image")
    ImageInputs(size=224, resample="bilinear", squash=True).check_files(tmp_path, "")
    clip = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip | {"resample": 3}))
    with pytest.raises(ValueError, match="eval_resize=256"):
        ImageInputs(size=224).check_files(tmp_path, "config.data.image")
    ImageInputs(size=224, eval_resize=256).check_files(tmp_path, "")
    ImageInputs(size=96).check_files(tmp_path, "")  # another size on purpose
