"""Prompt templates: CWCL Table 3 (ten simple ones), A.3.5 (the general list), and users' files.

The placeholder is `{c}`, as in CLIP_benchmark's files; `{}` and `{ }` mean the same.
"""

import re
from collections.abc import Sequence

from cwcl_jax.evaluation.files import read_json, read_text, user_file

# Table 3, in its order: k = 1 uses the first one, k = 5 the first five.
SIMPLE = (
    "a photo of a {c}",
    "an image of a {c}",
    "a picture of a {c}",
    "this is a {c}",
    "a snap of {c}",
    "a shot of {c}",
    "an illustration of {c}",
    "an example of {c}",
    "a {c} is pictured here",
    "In this picture, we can see a {c}",
)

# A.3.5, in its order: 48 sentences.
GENERAL = (
    "it is about {c}",
    "it was about {c}",
    "it will be about {c}",
    "this is about {c}",
    "this was about {c}",
    "this will be about {c}",
    "it is related to {c}",
    "it was related to {c}",
    "it will be related to {c}",
    "this is related to {c}",
    "this was related to {c}",
    "this will be related to {c}",
    "it is talking about {c}",
    "it was talking about {c}",
    "it will be talking about {c}",
    "this is talking about {c}",
    "this was talking about {c}",
    "this will be talking about {c}",
    "I am talking about {c}",
    "I was talking about {c}",
    "I will be talking about {c}",
    "You are talking about {c}",
    "You were talking about {c}",
    "You will be talking about {c}",
    "They are talking about {c}",
    "They were talking about {c}",
    "They will be talking about {c}",
    "We are talking about {c}",
    "We were talking about {c}",
    "We will be talking about {c}",
    "it talks about {c}",
    "it talked about {c}",
    "it will talk about {c}",
    "this talks about {c}",
    "this talked about {c}",
    "this will talk about {c}",
    "I talk about {c}",
    "I talked about {c}",
    "I will talk about {c}",
    "You talk about {c}",
    "You talked about {c}",
    "You will talk about {c}",
    "They talk about {c}",
    "They talked about {c}",
    "They will talk about {c}",
    "We talk about {c}",
    "We talked about {c}",
    "We will talk about {c}",
)

NAME = ("{c}",)
NAMED = {"simple": SIMPLE, "general": GENERAL, "name": NAME}

_FIELD = re.compile(r"\{([^{}]*)\}")


def load_templates(spec: str) -> tuple[str, ...]:
    """Returns a named list, or the templates of a user's file.

    The file has one template per line (.txt) or is a JSON list of templates.
    """
    if spec in NAMED:
        return NAMED[spec]
    path = user_file(spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"templates={spec!r} is neither a named list {sorted(NAMED)} nor a file; give the path "
            "of a text file with one template per line, where {c} stands for the class name."
        )
    lines = read_json(path) if path.suffix == ".json" else read_text(path).splitlines()
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{path}: expected a JSON list of template strings.")
    templates = tuple(canonical(line) for line in lines if line.strip())
    if not templates:
        raise ValueError(f"{path} holds no template; write one per line, with {{c}} for the class.")
    return templates


def canonical(template: str) -> str:
    """Returns `template` with the placeholder written `{c}`.

    Raises:
      ValueError: the template has another field, or none.
    """
    fields = _FIELD.findall(template)
    unknown = [name for name in fields if name.strip() not in ("", "c")]
    if unknown:
        problem = f"the unknown field {{{unknown[0]}}}"
    elif set("{}") & set(_FIELD.sub("", template)):
        problem = "an unmatched brace"
    elif not fields:
        problem = "no field"
    else:
        return _FIELD.sub("{c}", template.strip())
    raise ValueError(f"template {template!r} has {problem}; write {{c}} for the class name.")


def first_templates(templates: Sequence[str], k: int) -> tuple[str, ...]:
    """Returns the first `k` templates, as Table 3's k = 1, 5, 10 are chosen."""
    if not 1 <= k <= len(templates):
        raise ValueError(
            f"template_counts asks for k={k}, but the list has {len(templates)} templates; "
            f"choose k between 1 and {len(templates)}."
        )
    return tuple(templates[:k])


def fill(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the prompts of one class: every template with its name, or with each synonym.

    The prompts of the first k templates come first.
    """
    return [template.replace("{c}", name) for template in templates for name in names]


def sentences_by_class(
    sentences: Sequence[str], labels: Sequence[int], class_count: int, *, limit: int = 0
) -> list[list[str]]:
    """Returns the distinct sentences of each class, in order, to be used as prompts."""
    if len(sentences) != len(labels):
        raise ValueError(f"{len(sentences)} sentences but {len(labels)} labels.")
    groups: list[dict[str, None]] = [{} for _ in range(class_count)]
    for sentence, label in zip(sentences, labels, strict=True):
        if not 0 <= label < class_count:
            raise ValueError(
                f"label {label} of sentence {sentence!r} is not in 0..{class_count - 1}."
            )
        if not limit or len(groups[label]) < limit:
            groups[label].setdefault(sentence)
    return [list(group) for group in groups]


def sentences_with_word(
    sentences: Sequence[str], words: Sequence[str], *, limit: int = 0
) -> list[list[str]]:
    """Returns for each keyword the word itself, followed by the sentences that contain it."""
    groups: dict[str, dict[str, None]] = {word.lower(): {word: None} for word in words}
    for sentence in sentences:
        for word in set(re.findall(r"[\w']+", sentence.lower())) & groups.keys():
            if not limit or len(groups[word]) < limit:
                groups[word].setdefault(sentence)
    return [list(groups[word.lower()]) for word in words]


def readable(name: str) -> str:
    """Returns an identifier as words: `calendar_set` -> `calendar set`, `[IN:SET` -> `set`."""
    intent = re.fullmatch(r"\[?IN:([A-Z_]+)\]?", name)
    words = intent[1].lower() if intent else name
    return " ".join(words.replace("_", " ").split())
