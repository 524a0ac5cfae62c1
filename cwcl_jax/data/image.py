"""Pictures to uint8 RGB pixels of one size: decoding with every trap of web images, and crops.

Training: a random resized crop and a flip, where the options ask for them. Evaluation: the shorter
side resized, the centre cut out. Normalisation to a tower's range happens on the device.
"""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.options import ImageInputs
from cwcl_jax.data.skipping import BadExample

_BICUBIC = Image.Resampling.BICUBIC
_MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
# Not all that Pillow can open: its reader of EPS starts a PostScript interpreter on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_DRAFT_MARGIN = 1.5
_ORIENTATION = 0x0112
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError)
Box = tuple[float, float, float, float]


def train_pixels(
    data: bytes | Image.Image, inputs: ImageInputs, draws: Draws
) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels for training; the crop and the flip follow `draws`."""
    image = open_image(data, inputs.max_pixels)
    upright = _upright_size(image)
    if inputs.crop_min_area > 0:
        box = random_crop_box(*upright, inputs.crop_min_area, draws)
    else:
        box = _centre_box(*upright, 1.0)
    return _cut(image, upright, box, inputs.size, mirror=inputs.flip and draws.chance(0.5))


def eval_pixels(data: bytes | Image.Image, inputs: ImageInputs) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels for evaluation: shorter side to `eval_resize`, then the centre of `size`."""
    image = open_image(data, inputs.max_pixels)
    resize = inputs.eval_resize or inputs.size
    upright = _upright_size(image)
    box = _centre_box(*upright, min(1.0, inputs.size / resize))
    return _cut(image, upright, box, inputs.size)


def open_image(data: bytes | Image.Image, max_pixels: int) -> Image.Image:
    """Opens encoded bytes without decoding them; refuses empty, unknown and too large ones."""
    if isinstance(data, Image.Image):
        return data
    if not data:
        raise BadExample("image empty", "no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    # The warning arrives as an exception only where the user turned warnings into errors.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadExample("image too large", str(error)) from error
    except UnidentifiedImageError as error:  # its message names the buffer by its address
        raise BadExample("image unreadable", f"none of {', '.join(_FORMATS)}") from error
    except _DECODE_ERRORS as error:
        raise BadExample("image unreadable", str(error)) from error
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise BadExample("image too large", f"{pixels} pixels, data.image.max_pixels={max_pixels}")
    return image


def decode_rgb(image: Image.Image) -> Image.Image:
    """The decoded picture upright in RGB; transparent parts become white."""
    try:
        image.load()
        if image.mode == "RGB" and "exif" not in image.info:
            return image
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        if image.mode.startswith("I") or image.mode == "F":
            return Image.fromarray(_to_bytes(np.asarray(image, np.float64))).convert("RGB")
        return image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise BadExample("image unreadable", str(error)) from error


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey levels of more than eight bits to eight: 16-bit files by their range, others by max."""
    top = 65535.0 if values.max() > 255 else 255.0
    return np.clip(values / top * 255, 0, 255).astype(np.uint8)


def random_crop_box(width: int, height: int, min_area: float, draws: Draws) -> Box:
    """A box of a random share of the area in [min_area, 1] and an aspect ratio in [3/4, 4/3]."""
    for _ in range(10):
        area = width * height * draws.uniform(min_area, 1.0)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = draws.uniform(0, width - w), draws.uniform(0, height - h)
            return left, top, left + w, top + h
    return _centre_box(width, height, 1.0)


def _centre_box(width: int, height: int, share: float) -> Box:
    """The central square of `share` of the shorter side."""
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the rotation that the file asks for."""
    if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
        return image.height, image.width
    return image.size


def _cut(
    image: Image.Image, upright: tuple[int, int], box: Box, size: int, *, mirror: bool = False
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes, cuts out the box of the upright picture and resizes it."""
    if image.format == "JPEG":
        # The decoder itself scales by 1/2, 1/4 or 1/8, as long as the box keeps enough pixels for
        # the resampling behind it to be the one that decides what is seen.
        share = _DRAFT_MARGIN * size / min(box[2] - box[0], box[3] - box[1])
        if share <= 0.5:
            wanted = math.ceil(image.width * share), math.ceil(image.height * share)
            image.draft(image.mode, wanted)
    rgb = decode_rgb(image)
    if rgb.size != upright:
        x, y = rgb.width / upright[0], rgb.height / upright[1]
        right, bottom = min(box[2] * x, float(rgb.width)), min(box[3] * y, float(rgb.height))
        box = (box[0] * x, box[1] * y, right, bottom)
    if rgb.size != (size, size) or box != (0, 0, size, size):
        rgb = rgb.resize((size, size), _BICUBIC, box=box, reducing_gap=2.0)
    # Pillow mirrors faster than a copy of a numpy view with a negative stride.
    return np.asarray(rgb.transpose(_MIRROR) if mirror else rgb)
