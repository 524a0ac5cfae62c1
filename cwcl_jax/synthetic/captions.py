"""Captions of scenes: a small English grammar with paraphrases, and its tokenizer.

Of the ten simple templates of the paper's Table 3, four frames appear word for word in training
captions. The other six (`UNSEEN_FRAMES`) never do, although each of their words does. The number of
templates therefore matters at evaluation, as it does in the paper's Figure 5.
"""

from pathlib import Path

from cwcl_jax.data.draws import Draws
from cwcl_jax.synthetic import scenes
from cwcl_jax.synthetic.scenes import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    PATTERNS,
    PLACE_NAMES,
    SHAPES,
    SIZES,
)

TOKENIZER_FILE = Path(__file__).parent.parent / "assets" / "scenes_tokenizer.json"

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "ring": ("ring", "ring", "hoop"),
    "moon": ("moon", "moon", "crescent"),
    "diamond": ("diamond", "diamond", "rhombus"),
}
COLOUR_WORDS = {"purple": ("purple", "purple", "violet")}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium sized", "medium"),
    "large": ("large", "big", "huge"),
}
PATTERN_WORDS = {"striped": ("striped",), "spotted": ("spotted", "dotted"), "plain": ("plain",)}
PLACE_WORDS = {
    "in the middle": ("in the middle", "in the centre", "at the centre"),
    "on the left": ("on the left", "to the left"),
    "on the right": ("on the right", "to the right"),
    "at the top": ("at the top", "near the top"),
    "at the bottom": ("at the bottom", "near the bottom"),
}
BACKGROUND_WORDS = {
    "grass": ("on grass", "on the grass", "with grass behind"),
    "sand": ("on sand", "on the sand", "with sand around"),
    "snow": ("on snow", "in the snow", "with snow around"),
    "water": ("on water", "over water", "with water behind"),
    "bricks": ("on bricks", "on a brick wall", "in front of bricks"),
    "wood": ("on wood", "on a wooden board", "with wood behind"),
    "paper": ("on paper", "on a sheet of paper", "with paper behind"),
    "slate": ("on slate", "on dark slate", "with slate behind"),
}
# "{}" is the object with its article; "{bare}" is the object without one.
FRAMES = (
    "{}",
    "{}",
    "a picture of {}",
    "this is {}",
    "a shot of {bare}",
    "{} is pictured here",
    "there is {}",
    "we see {}",
    "you can see {} in this image",
    "the photo shows {}",
    "a drawing with {}",
    "an illustration showing {}",
    "here is an example with {}",
    "a quick snap that has {}",
    "the image contains {}",
    "look at this: {}",
    "a view of {}",
    "only {bare} and nothing else",
)
UNSEEN_FRAMES = (
    "a photo of a ",
    "an image of a ",
    "a snap of ",
    "an illustration of ",
    "an example of ",
    "in this picture, we can see a ",
)
_GROUP_FRAMES = ("{}", "{}", "{}", "a picture of {}", "there are {}", "we see {}", "{} together")
# Words of evaluation prompts that the grammar does not have.
_PROMPT_WORDS = (
    "a an the of in this that is it its photo image picture snap shot illustration example "
    "pictured here we can see drawing sketch painting rendering cropped close up bright dark clean "
    "dirty good bad blurry low high resolution black and white jpeg corrupted pixelated many one "
    "two three my your i with origami itap art toy cartoon embroidered sculpture graffiti tattoo "
    "plastic plush video game weird cool nice hard to hidden doodle depiction rendition scene for "
    "not"
)


def caption(
    scene: scenes.Scene, *key: int, detail: float = 0.5, frames: tuple[str, ...] = FRAMES
) -> str:
    """Returns one caption of a scene, a function of the integers `key`.

    `detail` is the probability that each optional attribute (size, pattern, place, background) is
    named. With 1.0 everything is named and nothing is left out.
    """
    draws = Draws(7, *key)
    things = [_noun_phrase(draws, scene, k, detail) for k in range(len(scene.objects))]
    # People often name only the main objects in captions.
    if len(things) == 3 and detail < 1 and draws.chance(0.25):
        things.pop()
    behind = ""
    if draws.chance(detail):
        behind = " " + draws.pick(BACKGROUND_WORDS[BACKGROUND_NAMES[scene.background]])
    if len(things) == 1:
        place = ""
        if len(scene.objects) == 1 and draws.chance(detail):
            name = PLACE_NAMES[scene.place]
            place = " " + draws.pick(PLACE_WORDS.get(name, (name,)))
        text = draws.pick(frames).format(with_article(things[0]), bare=things[0])
        return text + place + behind
    joined = _join(draws, scene, [with_article(thing) for thing in things], detail)
    return draws.pick(_GROUP_FRAMES).format(joined) + behind


def with_article(noun_phrase: str) -> str:
    """Returns the phrase with "a" or "an" before it."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def _noun_phrase(draws: Draws, scene: scenes.Scene, number: int, detail: float) -> str:
    thing = scene.objects[number]
    shape, colour = SHAPES[thing.shape], COLOUR_NAMES[thing.colour]
    words = []
    if draws.chance(detail * 0.8 if detail < 1 else 1.0):
        words.append(draws.pick(SIZE_WORDS[SIZES[thing.size]]))
    if thing.pattern and draws.chance(detail):
        words.append(draws.pick(PATTERN_WORDS[PATTERNS[thing.pattern]]))
    # Sometimes colour or shape is not named, so that each is also learned alone.
    left_out = draws.below(10) if detail < 1 else 9
    if left_out != 0:
        words.append(draws.pick(COLOUR_WORDS.get(colour, (colour,))))
    if left_out == 1:
        words.append(draws.pick(("shape", "object", "thing")))
    else:
        words.append(draws.pick(SHAPE_WORDS.get(shape, (shape,))))
    return " ".join(words)


def _join(draws: Draws, scene: scenes.Scene, phrases: list[str], detail: float) -> str:
    if len(phrases) == 2 and len(scene.objects) == 2 and draws.chance(detail):
        return f"{phrases[0]} {_relation(draws, scene)} {phrases[1]}"
    if len(phrases) == 2:
        return f"{phrases[0]} {draws.pick(('and', 'next to', 'with', 'beside'))} {phrases[1]}"
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _relation(draws: Draws, scene: scenes.Scene) -> str:
    """Returns the position of the first of two objects relative to the second, in words."""
    first, second = scene.objects
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > 0.3 and (abs(down) < 0.3 or draws.chance(0.5)):
        return "to the left of" if across < 0 else "to the right of"
    return draws.pick(("above", "over")) if down < 0 else draws.pick(("below", "under"))


def vocabulary() -> list[str]:
    """Returns every word that the grammar or an evaluation prompt may use, sorted."""
    tables = (SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, PATTERN_WORDS, PLACE_WORDS, BACKGROUND_WORDS)
    phrases = [w for table in tables for options in table.values() for w in options]
    phrases += [*SHAPES, *COLOUR_NAMES, *PLACE_NAMES, *FRAMES, *UNSEEN_FRAMES, *_GROUP_FRAMES]
    phrases += ["shape object thing and next to with beside", _PROMPT_WORDS]
    phrases += ["to the left of right above over below under"]
    text = " ".join(phrases).lower().replace("{bare}", " ").replace("{}", " ")
    return sorted(set(text.replace(",", " ").replace(":", " ").split()))


def build_tokenizer():
    """Returns the package's tokenizer: whole words of `vocabulary`, anything else by letters.

    `python -m cwcl_jax.synthetic.captions` writes it to `TOKENIZER_FILE`.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    tokens = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *letters, *(f"##{c}" for c in letters)]
    tokens += [word for word in vocabulary() if word not in tokens]
    table = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=table, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        special_tokens=[("[BOS]", table["[BOS]"]), ("[EOS]", table["[EOS]"])],
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[BOS]", "[EOS]"])
    return tokenizer


if __name__ == "__main__":
    build_tokenizer().save(str(TOKENIZER_FILE))
    print(f"{TOKENIZER_FILE}: {build_tokenizer().get_vocab_size()} tokens")
