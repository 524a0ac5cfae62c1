"""Decodes pictures to uint8 RGB pixels of one size, robust to malformed web images.

Training uses a random resized crop and a flip, if the options ask for them. Evaluation resizes the
shorter side and cuts out the centre. Normalisation to a tower's range happens on the device.
"""

import dataclasses
import io
import json
import math
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities.base import ENDLESS, ArraySpec, Modality, check_ranges, check_views

PROCESSOR = "preprocessor_config.json"
FILTERS = {str(kind.name).lower(): kind for kind in Image.Resampling}
_MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
# Not all formats of Pillow: its EPS reader starts a PostScript interpreter on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_DRAFT_MARGIN = 1.5
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error,
)  # fmt: skip
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class ImageInputs(Modality):
    """How a picture becomes `pixels`: uint8, (size, size, 3). Towers normalise on the device.

    Users pass paths, encoded bytes, PIL images or uint8 arrays (y, x, 3).
    """

    name: ClassVar[str] = "image"
    # A JPEG of 512x384 to 224x224 (data/README.md).
    core_seconds: ClassVar[float] = 0.0024
    stream: ClassVar[int] = 1
    training_only: ClassVar[tuple[str, ...]] = ("crop_min_area", "flip", "views")
    has_border: ClassVar[bool] = True

    field: str = "image"
    size: int = 64
    # Smallest share of the picture that a random training crop covers; 0 = no random crop.
    crop_min_area: float = 0.0
    flip: bool = False
    # Training draws among so many fixed views of each picture, the first of them evaluation's; 0 =
    # a new random one each time. A feature cache needs a number (configs/README.md).
    views: int = 0
    # Larger pictures are skipped and counted before any of their pixels are decoded.
    max_pixels: int = 64_000_000
    # Shorter side before the central crop (256 for ImageNet at 224); 0 = `size`.
    eval_resize: int = 0
    # Resampling filter: "bicubic", "bilinear", "lanczos", "box", "hamming" or "nearest".
    resample: str = "bicubic"
    # Resize the whole picture to a square, ignoring its aspect ratio, instead of the central crop.
    squash: bool = False

    def __post_init__(self):
        if self.resample not in FILTERS:
            raise ValueError(f"resample={self.resample!r} is not one of {', '.join(FILTERS)}.")
        if self.squash and self.eval_resize not in (0, self.size):
            raise ValueError("squash=True crops nothing: leave out eval_resize.")
        check_views(self.views, bool(self.crop_min_area or self.flip))
        check_ranges(self, size=(1, ENDLESS), crop_min_area=(0, 1), max_pixels=(1, ENDLESS))
        if self.eval_resize and self.eval_resize < self.size:
            raise ValueError(
                f"eval_resize={self.eval_resize} is smaller than size={self.size}, which is "
                "cropped out of it; make it at least size, or 0 for size itself."
            )

    def arrays(self) -> dict[str, ArraySpec]:
        return {"pixels": ArraySpec((self.size, self.size, 3), "uint8")}

    def prepare(self, value: Any, draws: Draws | None = None) -> dict[str, np.ndarray]:
        made = eval_pixels(value, self) if draws is None else train_pixels(value, self, draws)
        return {"pixels": made}

    def listed(self, items: Any) -> list[Any]:
        """Returns one picture or many as a list; an array of pictures counts as many."""
        if hasattr(items, "__array__") and not isinstance(items, Image.Image):
            items = np.asarray(items)
            return [items] if items.ndim == 3 else list(items)
        if isinstance(items, (str, bytes, Path, Image.Image)):
            return [items]
        return list(items)

    def opened(self, item: Any) -> bytes | Image.Image:
        return open_picture(item)

    def preview(self, value: Any) -> UInt8[np.ndarray, "y x 3"]:
        return eval_pixels(value, self)

    def varies(self, source: Any) -> str:
        if not (self.crop_min_area or self.flip):
            return ""
        return (
            f"crop_min_area={self.crop_min_area} and flip={self.flip} change the pictures; set "
            "views to a number of fixed ones, or them to 0 and False"
        )

    def check(self, settings: Any, *, options: str, overrides: str, imported: bool) -> None:
        expected = getattr(settings, "image_size", self.size)
        if self.size != expected:
            raise ValueError(
                f"{options}.size={self.size}, but the tower reads {expected} x {expected}: set "
                f"--{options}.size={expected}, or image_size={self.size} in {overrides} (an "
                "imported position grid is resampled)"
            )

    def of_folder(self, folder: Path) -> "ImageInputs":
        """Returns the inputs with the options of the image processor next to weights."""
        return dataclasses.replace(self, **_asked_by(folder, self.size))

    def check_files(self, folder: Path, options: str) -> None:
        asked = _asked_by(folder, self.size)
        different = {name: x for name, x in asked.items() if x != getattr(self, name)}
        if different:
            flags = " ".join(f"--{options}.{name}={value}" for name, value in different.items())
            raise ValueError(
                f"the {PROCESSOR} next to the weights prepares pictures differently: set {flags}"
            )

    def without_border(self, value: Any, pixels: int) -> Image.Image:
        """Returns a picture without `pixels` on every side.

        Raises:
          BadExample: it cannot be read, is too large, or nothing of it would be left.
        """
        opened = open_image(value, self.max_pixels)
        width, height = opened.size
        if min(width, height) <= 2 * pixels:
            raise BadExample(
                "image too small", f"{width}x{height}, crop_border={pixels} leaves none"
            )
        # decodes in place, so that undecodable data is refused here and not by crop
        decode_rgb(opened)
        return opened.crop((pixels, pixels, width - pixels, height - pixels))


def _asked_by(folder: Path, size: int) -> dict[str, Any]:
    """Returns the options that correspond to the image processor's file next to weights.

    The file may leave some options open. Its resizing counts only at the processor's own `size`.
    """
    file = folder / PROCESSOR
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not isinstance(content, dict) or not content.get("do_resize", True):
        return {}
    asked: dict[str, Any] = {}
    if isinstance(content.get("resample"), int):
        asked["resample"] = Image.Resampling(content["resample"]).name.lower()
    resize, crop = content.get("size"), content.get("crop_size")
    cropped = content.get("do_center_crop", crop is not None)
    if not isinstance(resize, dict):  # an old file, whose meaning depends on its class
        return asked
    asked["squash"] = "height" in resize and not cropped
    short = resize.get("shortest_edge", resize.get("height"))
    cut = crop.get("height") if isinstance(crop, dict) else crop
    if cropped and cut == size and short is not None:
        asked["eval_resize"] = 0 if short == size else short
    return asked


def open_picture(item: Any) -> bytes | Image.Image:
    """Returns encoded bytes, or a picture that is not shared with the caller."""
    if isinstance(item, (str, Path)):
        return Path(item).read_bytes()
    if isinstance(item, bytes):
        return item
    if isinstance(item, Image.Image):
        try:
            # Decoding an undecoded JPEG could leave the caller with a thumbnail.
            return item.copy()
        except OSError as error:
            raise BadExample("image unreadable", str(error)) from error
    if not hasattr(item, "__array__"):
        raise ValueError(
            "a picture is a path, encoded bytes, a PIL image or a uint8 array (y, x, 3), not "
            f"{type(item).__name__}"
        )
    array = np.asarray(item)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(
            f"an image array is uint8 (y, x, 3), not {array.dtype} {array.shape}: convert it"
        )
    return Image.fromarray(array)


def train_pixels(
    data: bytes | Image.Image, inputs: ImageInputs, draws: Draws
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels for training; the crop and the flip follow `draws`."""
    image = open_image(data, inputs.max_pixels)
    orientation = orientation_of(image)
    upright = _upright_size(image, orientation)
    if inputs.crop_min_area > 0:
        box = random_crop_box(*upright, inputs.crop_min_area, draws)
    elif inputs.squash:
        box = (0.0, 0.0, float(upright[0]), float(upright[1]))
    else:
        box = _centre_box(*upright, 1.0)
    mirror = inputs.flip and draws.chance(0.5)
    return _cut(image, orientation, box, inputs, mirror=mirror)


def eval_pixels(data: bytes | Image.Image, inputs: ImageInputs) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels for evaluation: shorter side to `eval_resize`, then the centre of `size`.

    Sizes are rounded as in torchvision, and every pixel is decoded. The result is the same as in
    the libraries that imported weights come from, and the same for a file and for the picture in
    it.
    """
    image = open_image(data, inputs.max_pixels)
    rgb = decode_rgb(image, orientation_of(image))
    size, short = inputs.size, inputs.eval_resize or inputs.size
    wanted = (size, size) if inputs.squash else _around(*rgb.size, short)
    if rgb.size != wanted:
        rgb = rgb.resize(wanted, FILTERS[inputs.resample])
    left, top = (round((side - size) / 2) for side in wanted)
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


def _around(width: int, height: int, short: int) -> tuple[int, int]:
    """Returns width and height with a shorter side of `short`; the longer one is rounded down."""
    return (short, short * height // width) if width <= height else (short * width // height, short)


def open_image(data: bytes | Image.Image, max_pixels: int) -> Image.Image:
    """Returns encoded bytes as an opened picture, not decoded yet.

    Raises:
      BadExample: the bytes are empty, of an unknown format, or too large.
    """
    if isinstance(data, Image.Image):
        return data
    if not data:
        raise BadExample("image empty", "no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    # The warning is an exception only if the user turned warnings into errors.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadExample("image too large", str(error)) from error
    except UnidentifiedImageError as error:  # its message contains the buffer's address
        raise BadExample("image unreadable", f"none of {', '.join(_FORMATS)}") from error
    except _DECODE_ERRORS as error:
        raise BadExample("image unreadable", str(error)) from error
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise BadExample("image too large", f"{pixels} pixels, max_pixels={max_pixels}")
    return image


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation of an opened picture, 1 to 8; 1 if none can be read.

    All formats except JPEG are decoded first: the tag of a PNG may follow its pixels.
    """
    if image.format != "JPEG":
        _load(image)
    if "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION)
        return orientation if orientation in _TURNS else 1
    except _DECODE_ERRORS:
        return 1


def decode_rgb(image: Image.Image, orientation: int = 1) -> Image.Image:
    """Returns the decoded picture in RGB, rotated upright; transparent parts become white."""
    _load(image)
    clear = image.info.get("transparency")
    try:
        if image.mode[0] in "IF":
            image = Image.fromarray(_to_bytes(np.asarray(image, np.float64), image.mode, clear))
        elif image.mode in ("RGBA", "LA", "PA") or clear is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        # Transposed here: Pillow's own function rewrites all other tags, and any of them may be
        # broken.
        return image if orientation == 1 else image.transpose(_TURNS[orientation])
    except _DECODE_ERRORS as error:
        raise BadExample("image unreadable", str(error)) from error


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except _DECODE_ERRORS as error:
        raise BadExample("image unreadable", str(error)) from error


def _to_bytes(values: np.ndarray, mode: str, clear: int | None) -> np.ndarray:
    """Returns grey levels of more than eight bits as eight bits; the level `clear` becomes white.

    Full scale is the first of 1 (floats), 255, 65535 that is not exceeded, else the largest level.
    """
    largest = values.max()
    if not np.isfinite(largest):
        raise ValueError("pixels that are not numbers")
    scales = (1.0, 255.0, 65535.0, largest)[0 if mode == "F" else 1 :]
    full = next(scale for scale in scales if largest <= scale)
    levels = np.clip(values / full * 255, 0, 255).astype(np.uint8)
    return levels if clear is None else np.where(values == clear, np.uint8(255), levels)


def random_crop_box(width: int, height: int, min_area: float, draws: Draws) -> Box:
    """Returns a box with a random area share in [min_area, 1] and an aspect ratio in [3/4, 4/3]."""
    for _ in range(10):
        area = width * height * draws.uniform(min_area, 1.0)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = draws.uniform(0, width - w), draws.uniform(0, height - h)
            return left, top, left + w, top + h
    return _centre_box(width, height, 1.0)


def _centre_box(width: int, height: int, share: float) -> Box:
    """Returns the central square whose side is `share` of the shorter side."""
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Returns width and height after the rotation that the file requests."""
    return (image.height, image.width) if orientation >= 5 else image.size


def _cut(
    image: Image.Image, orientation: int, box: Box, inputs: ImageInputs, *, mirror: bool
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the box of the upright picture, decoded and resized."""
    size, upright = inputs.size, _upright_size(image, orientation)
    if image.format == "JPEG":
        # The decoder scales by 1/2, 1/4 or 1/8, as long as the box keeps enough pixels for the
        # later resampling to determine the result.
        share = _DRAFT_MARGIN * size / min(box[2] - box[0], box[3] - box[1])
        if share <= 0.5:
            wanted = math.ceil(image.width * share), math.ceil(image.height * share)
            image.draft(image.mode, wanted)
    rgb = decode_rgb(image, orientation)
    if rgb.size != upright:
        x, y = rgb.width / upright[0], rgb.height / upright[1]
        right, bottom = min(box[2] * x, float(rgb.width)), min(box[3] * y, float(rgb.height))
        box = (box[0] * x, box[1] * y, right, bottom)
    if rgb.size != (size, size) or box != (0, 0, size, size):
        rgb = rgb.resize((size, size), FILTERS[inputs.resample], box=box, reducing_gap=2.0)
    # Pillow mirrors faster than a copy of a numpy view with a negative stride.
    return np.asarray(rgb.transpose(_MIRROR) if mirror else rgb)
