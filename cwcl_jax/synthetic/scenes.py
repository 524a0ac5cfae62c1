"""Synthetic pictures: one to three coloured shapes on a background.

A scene is a function of integers (seed, stream, index): nothing is read from disk and the supply is
unlimited. Twenty of the hundred shape-colour combinations are held out: training scenes never
contain them, in pictures or in captions, so naming them at evaluation is truly zero-shot.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from cwcl_jax.data.draws import Draws, hash_integers

SHAPES = (
    "star",
    "circle",
    "square",
    "triangle",
    "heart",
    "diamond",
    "cross",
    "ring",
    "arrow",
    "moon",
)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 215, 40),
    "green": (45, 160, 65),
    "blue": (40, 85, 205),
    "purple": (125, 45, 160),
    "pink": (245, 130, 185),
    "brown": (115, 70, 35),
    "white": (245, 245, 245),
    "black": (22, 22, 24),
}
COLOUR_NAMES = tuple(COLOURS)
PATTERNS = ("plain", "striped", "spotted")
SIZES = ("small", "medium", "large")
# Name -> two colours that its texture mixes.
BACKGROUNDS = {
    "grass": ((70, 120, 55), (105, 150, 75)),
    "sand": ((205, 180, 135), (225, 205, 165)),
    "snow": ((215, 225, 235), (235, 240, 248)),
    "water": ((70, 125, 160), (115, 165, 195)),
    "bricks": ((150, 90, 75), (185, 165, 150)),
    "wood": ((150, 110, 70), (175, 135, 90)),
    "paper": ((225, 215, 200), (235, 228, 215)),
    "slate": ((60, 65, 75), (85, 92, 102)),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
# Centres in units of the picture's side, for a scene of one object.
PLACES = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "in the top left corner": (0.27, 0.27),
    "in the top right corner": (0.73, 0.27),
    "in the bottom left corner": (0.27, 0.73),
    "in the bottom right corner": (0.73, 0.73),
}
PLACE_NAMES = tuple(PLACES)
_QUARTERS = ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))
_RADIUS = {"small": (0.10, 0.125), "medium": (0.15, 0.175), "large": (0.205, 0.235)}
_TURNS = 9
_VARIATIONS = 8


def is_held_out(shape: int, colour: int) -> bool:
    """Returns whether training excludes a combination: two for every shape and every colour."""
    return (colour + 3 * shape) % 5 == 0


COMBINATIONS = tuple((s, c) for s in range(len(SHAPES)) for c in range(len(COLOUR_NAMES)))
HELD_OUT = tuple(pair for pair in COMBINATIONS if is_held_out(*pair))
TRAINED = tuple(pair for pair in COMBINATIONS if not is_held_out(*pair))


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape; `x`, `y` and `radius` are in units of the picture's side."""

    shape: int
    colour: int
    pattern: int
    size: int
    x: float
    y: float
    radius: float
    turn: int
    tint: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a picture; `place` is meaningful for a single object only."""

    background: int
    variation: int
    place: int
    objects: tuple[SceneObject, ...]


def describe(
    seed: int,
    stream: int,
    index: int,
    *,
    objects: int = 0,
    shape: int | None = None,
    colour: int | None = None,
    held_out: bool = False,
) -> Scene:
    """Returns scene number `index` of a stream; `objects` = 0 draws one to three objects.

    `shape` and `colour` fix those of the first object, for labelled sets. `held_out` draws its
    combination from the held-out ones instead of the trained ones.
    """
    draws = Draws(seed, stream, index)
    count = objects or 1 + draws.below(3)
    pairs = HELD_OUT if held_out else TRAINED
    place = draws.below(len(PLACES))
    centres = [PLACES[PLACE_NAMES[place]]] if count == 1 else _some_quarters(draws, count)
    made = []
    for number, centre in enumerate(centres):
        if number == 0 and (shape is not None or colour is not None):
            fitting = _fitting(pairs, shape, colour)
        else:
            fitting = pairs
        made.append(_object(draws, draws.pick(fitting), centre))
    return Scene(draws.below(len(BACKGROUNDS)), draws.below(_VARIATIONS * 4), place, tuple(made))


@functools.cache
def _fitting(pairs: tuple, shape: int | None, colour: int | None) -> tuple:
    return tuple(p for p in pairs if shape in (None, p[0]) and colour in (None, p[1]))


def _some_quarters(draws: Draws, count: int) -> list[tuple[float, float]]:
    first, step = draws.below(4), 1 + 2 * draws.below(2)
    if count == 2 and draws.chance(1 / 3):
        step = 2
    return [_QUARTERS[(first + step * k) % 4] for k in range(count)]


def _object(draws: Draws, pair: tuple[int, int], centre: tuple[float, float]) -> SceneObject:
    size = draws.below(len(SIZES))
    pattern = max(0, draws.below(4) - 1)
    low, high = _RADIUS[SIZES[size]]
    base = COLOURS[COLOUR_NAMES[pair[1]]]
    light = draws.below(25) - 12
    tint = tuple(min(255, max(0, part + light + draws.below(17) - 8)) for part in base)
    return SceneObject(
        shape=pair[0],
        colour=pair[1],
        pattern=pattern,
        size=size,
        x=centre[0] + draws.uniform(-0.03, 0.03),
        y=centre[1] + draws.uniform(-0.03, 0.03),
        radius=draws.uniform(low, high),
        turn=draws.below(_TURNS),
        tint=(tint[0], tint[1], tint[2]),
    )


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """Returns the picture of a scene, RGB, (size, size)."""
    image = _background(scene.background, scene.variation, size).copy()
    canvas = ImageDraw.Draw(image)
    for thing in scene.objects:
        _draw_object(image, canvas, thing, size)
    return ImageChops.add(image, _noise(scene.variation % _VARIATIONS, size), 1, -128)


def _draw_object(
    image: Image.Image, canvas: ImageDraw.ImageDraw, thing: SceneObject, size: int
) -> None:
    points = _outline(thing.shape, thing.turn)
    x, y, radius = thing.x * size, thing.y * size, thing.radius * size
    placed = [(x + radius * a, y + radius * b) for a, b in points]
    dark = sum(thing.tint) < 150
    edge = (150, 150, 155) if dark else tuple(part * 2 // 5 for part in thing.tint)
    canvas.polygon(placed, fill=thing.tint)
    if thing.pattern:
        _draw_pattern(image, placed, thing, size)
    canvas.polygon(placed, outline=edge)


def _draw_pattern(image: Image.Image, placed: list, thing: SceneObject, size: int) -> None:
    """Draws stripes or spots in a lighter or darker tone of the same colour, inside the outline."""
    left = max(0, int((thing.x - thing.radius * 1.1) * size))
    top = max(0, int((thing.y - thing.radius * 1.1) * size))
    side = int(thing.radius * 2.2 * size) + 2
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).polygon([(a - left, b - top) for a, b in placed], fill=255)
    pattern = _pattern_mask(thing.pattern, thing.turn, size).crop((0, 0, side, side))
    tone = 75 if sum(thing.tint) < 390 else -75
    second = tuple(min(255, max(0, part + tone)) for part in thing.tint)
    image.paste(second, (left, top, left + side, top + side), ImageChops.multiply(mask, pattern))


@functools.cache
def _outline(shape: int, turn: int) -> tuple[tuple[float, float], ...]:
    """Returns the corners of a shape of radius one, rotated by up to 16 degrees."""
    angle = math.radians((turn - _TURNS // 2) * 4)
    sine, cosine = math.sin(angle), math.cos(angle)
    return tuple((cosine * a - sine * b, sine * a + cosine * b) for a, b in _corners(SHAPES[shape]))


def _arc(radius: float, start: float, stop: float, steps: int, x: float = 0.0) -> list:
    """Returns points on an arc around (x, 0), angles in turns, both ends included."""
    angles = [2 * math.pi * (start + (stop - start) * k / steps) for k in range(steps + 1)]
    return [(x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _corners(name: str) -> list[tuple[float, float]]:
    if name == "star":
        radii = [1.1 if k % 2 == 0 else 0.45 for k in range(10)]
        angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    if name == "heart":
        angles = [2 * math.pi * k / 24 for k in range(24)]
        wave = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) for a in angles]
        return [(math.sin(a) ** 3, -w / 15) for a, w in zip(angles, wave, strict=True)]
    if name == "ring":  # the slit between outer and inner arc has no width
        return _arc(1.0, 0.0, 1.0, 24) + _arc(0.52, 1.0, 0.0, 24)
    if name == "moon":
        outer = _arc(1.0, 0.15, 0.85, 18)
        return outer + _arc(0.9, 0.77, 0.23, 14, x=0.45)
    return {
        "circle": _arc(0.95, 0.0, 1.0, 24)[:-1],
        "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
        "triangle": [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)],
        "diamond": [(0.0, -1.1), (0.7, 0.0), (0.0, 1.1), (-0.7, 0.0)],
        "cross": [
            (-0.32, -1.0), (0.32, -1.0), (0.32, -0.32), (1.0, -0.32), (1.0, 0.32), (0.32, 0.32),
            (0.32, 1.0), (-0.32, 1.0), (-0.32, 0.32), (-1.0, 0.32), (-1.0, -0.32), (-0.32, -0.32),
        ],
        "arrow": [
            (-1.0, -0.28), (0.1, -0.28), (0.1, -0.8), (1.05, 0.0), (0.1, 0.8), (0.1, 0.28),
            (-1.0, 0.28),
        ],
    }[name]  # fmt: skip


def _random_field(key: int, height: int, width: int) -> np.ndarray:
    """Returns random bytes of one shape, the same on every platform."""
    draws = Draws(0x5CE7E, key)
    words = np.array([draws.below(1 << 64) for _ in range(-(-height * width // 8))], np.uint64)
    data = np.frombuffer(words.astype("<u8").tobytes(), np.uint8)
    return data[: height * width].reshape(height, width)


@functools.cache
def _noise(variation: int, size: int) -> Image.Image:
    """Returns grain of about +-7 levels around 128."""
    field = _random_field(hash_integers(1, variation, size), size, size).astype(np.int32)
    grey = (120 + (field % 16)).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))


@functools.cache
def _pattern_mask(pattern: int, turn: int, size: int) -> Image.Image:
    """Returns stripes or spots over a whole picture, with a width in proportion to its side."""
    rows, columns = np.mgrid[0:size, 0:size] * (64 / size)
    if PATTERNS[pattern] == "striped":
        slope = (rows, columns, rows + columns)[turn % 3]
        inside = slope % 6 < 3
    else:
        inside = ((rows % 6) - 3) ** 2 + ((columns % 6) - 3) ** 2 < 3.6
    return Image.fromarray((inside * 255).astype(np.uint8))


@functools.cache
def _background(kind: int, variation: int, size: int) -> Image.Image:
    """Returns one of 32 pictures of a background: 8 textures, mirrored in each direction or not."""
    name = BACKGROUND_NAMES[kind]
    texture = _texture(name, variation % _VARIATIONS, size)
    flips = variation // _VARIATIONS
    texture = texture[:: -1 if flips & 1 else 1, :: -1 if flips & 2 else 1]
    first, second = (np.array(c, np.float64) for c in BACKGROUNDS[name])
    light = Draws(2, kind, variation).uniform(-14, 14)
    mixed = first + texture[:, :, None] * (second - first) + light
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def _texture(name: str, variation: int, size: int) -> np.ndarray:
    """Returns the share of the second colour at every pixel, in [0, 1]."""
    draws = Draws(3, BACKGROUND_NAMES.index(name), variation)
    rows, columns = np.mgrid[0:size, 0:size] * (64 / size)
    shift = draws.below(64)
    fine = _random_field(hash_integers(4, variation, size), size, size) / 255.0
    if name == "water":
        return 0.5 + 0.5 * np.sin((rows + 2.5 * np.sin((columns + shift) / 7)) * 0.8)
    if name == "bricks":
        course = (rows + shift) // 8
        mortar = ((rows + shift) % 8 < 1) | ((columns + shift + 6 * (course % 2)) % 12 < 1)
        return np.where(mortar, 1.0, 0.15 * fine)
    if name == "wood":
        return 0.5 + 0.5 * np.sin((columns + 1.5 * np.sin((rows + shift) / 11)) * 1.3)
    if name in ("paper", "slate"):
        ramp = (rows * draws.uniform(0.3, 1) + columns * draws.uniform(0.3, 1)) / 128
        return np.clip(ramp + 0.2 * fine, 0, 1)
    coarse = _random_field(hash_integers(5, variation, size), 8, 8) / 255.0
    blocks = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR))
    share = {"grass": 0.7, "sand": 0.4, "snow": 0.2}[name]
    return share * fine + (1 - share) * blocks
