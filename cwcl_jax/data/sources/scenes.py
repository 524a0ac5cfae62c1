"""The embedded scenes as a source: `scenes:train`, `scenes:test?task=combination&n=1000`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.sources.base import Example, Source, fingerprint_of
from cwcl_jax.synthetic import captions, scenes

# Part of the fingerprint: increase it when a drawing or a caption changes.
_VERSION = 1
# Test scenes have other number streams than training scenes.
_STREAMS = {"train": 0, "retrieval": 1, "shape": 2, "colour": 3, "combination": 4}
_DEFAULT_LENGTH = {"train": 1_000_000, "retrieval": 1000}
_CLASSES = {
    "shape": tuple(scenes.SHAPES),
    # A bare colour is not an object that a photo can show.
    "colour": tuple(f"{colour} object" for colour in scenes.COLOUR_NAMES),
    "combination": tuple(
        f"{scenes.COLOUR_NAMES[colour]} {scenes.SHAPES[shape]}" for shape, colour in scenes.HELD_OUT
    ),
}


@dataclass(frozen=True)
class Scenes(Source):
    """Scenes of one stream; labelled and with one object if `task` is a classification task."""

    task: str
    length: int
    seed: int = 0
    size: int = 64
    captions_each: int = 1
    # Probability that a training caption names each optional attribute; with fewer easy cues
    # (background, place), shape matters more.
    detail: float = 0.5
    # Number of objects in an unlabelled scene; 0 = one to three.
    objects: int = 0
    # Scene numbers, if they are not simply 0, 1, 2, ...
    numbers: Sequence[int] = field(default=(), repr=False)

    @property
    def class_names(self) -> Sequence[str] | None:
        """Class names in label order, for the classification tasks."""
        return _CLASSES.get(self.task)

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, fields: Collection[str]) -> Example:
        number = self.numbers[index] if self.numbers else index
        example: Example = {"id": f"{self.task}-{self.seed}-{number:08d}"}
        if "image" in fields or "text" in fields:
            scene = self.scene(number)
            if "image" in fields:
                example["image"] = scenes.draw(scene, self.size)
            if "text" in fields:
                made = [self.caption(scene, number, k) for k in range(self.captions_each)]
                example["text"] = made[0] if len(made) == 1 else made
        if self.class_names is not None:
            example["label"] = self.label(number)
        return example

    def label(self, number: int) -> int:
        """Returns the label of a number; classes are balanced, in an order without a pattern."""
        classes = len(self.class_names or ())
        block, place = divmod(number, classes)
        step = (1, 3, 7, 9)[Draws(self.seed, 11, block).below(4)]
        return (place * step + Draws(self.seed, 12, block).below(classes)) % classes

    def scene(self, number: int) -> scenes.Scene:
        """Returns the scene of a number in this stream."""
        stream = _STREAMS[self.task]
        if self.class_names is None:
            return scenes.describe(self.seed, stream, number, objects=self.objects)
        label = self.label(number)
        shape = label if self.task == "shape" else None
        colour = label if self.task == "colour" else None
        held_out = self.task == "combination"
        if held_out:
            shape, colour = scenes.HELD_OUT[label]
        return scenes.describe(
            self.seed,
            stream,
            number,
            objects=1,
            shape=shape,
            colour=colour,
            held_out=held_out,
        )

    def caption(self, scene: scenes.Scene, number: int, variant: int) -> str:
        """Returns a caption of the scene; test captions name everything."""
        detail = self.detail if self.task == "train" else 1.0
        key = (self.seed, _STREAMS[self.task], number, variant)
        return captions.caption(scene, *key, detail=detail)

    def fingerprint(self) -> str:
        varied = () if (self.detail, self.objects) == (0.5, 0) else (self.detail, self.objects)
        shared = (self.task, self.length, self.seed, self.size, self.captions_each)
        return fingerprint_of("scenes", _VERSION, *shared, *varied)


def open_scenes(
    split: str,
    *,
    task: str = "",
    n: int = 0,
    seed: int = 0,
    size: int = 64,
    captions: int = 1,
    detail: float = 0.5,
    objects: int = 0,
) -> Scenes:
    """Opens `scenes:train` or `scenes:test?task=shape|colour|combination|retrieval`."""
    if split == "test" and task not in ("retrieval", *_CLASSES):
        raise ValueError(
            f"scenes:test needs task=shape, colour, combination or retrieval; got {task!r}."
        )
    if split == "train" and task:
        raise ValueError(f"scenes:train has no tasks (got task={task!r}); use scenes:test.")
    if split not in ("train", "test"):
        raise ValueError(f"scenes: has the splits train and test, not {split!r}.")
    if n < 0 or size < 16 or captions < 1 or not 0 <= detail < 1 or not 0 <= objects <= 3:
        raise ValueError(
            f"scenes: one of n={n}, size={size}, captions={captions}, detail={detail} (below 1), "
            f"objects={objects} (0 to 3) is out of range."
        )
    task = task or "train"
    length = n or _DEFAULT_LENGTH.get(task, 1000)
    source = Scenes(task, length, seed, size, captions, detail, objects)
    return source if task != "retrieval" else _with_distinct_captions(source)


def _with_distinct_captions(source: Scenes) -> Scenes:
    """Returns the source without scenes that share a caption with an earlier scene.

    Retrieval must have one right answer.
    """
    seen: set[str] = set()
    numbers: list[int] = []
    number = 0
    while len(numbers) < source.length:
        scene = source.scene(number)
        made = [source.caption(scene, number, k) for k in range(source.captions_each)]
        if seen.isdisjoint(made):
            seen.update(made)
            numbers.append(number)
        number += 1
    return replace(source, numbers=tuple(numbers))
