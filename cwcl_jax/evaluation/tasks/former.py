"""Reads tasks written by older versions, in which one class held the fields of all kinds.

In a config.json of such a version, every task has all of these fields. A field that the kind does
not have is dropped if it holds its old default.
"""

from collections.abc import Collection, Mapping
from typing import Any

_RENAMED = {"modality": "tower"}
# Field -> its old default in every task.
_DEFAULTS: dict[str, Any] = {
    "templates": "",
    "template_counts": (),
    "template_source": "",
    "sentences_per_class": 0,
    "class_names": "",
    "class_subset": "",
    "unmapped_classes": "error",
    "top_k": (1, 5),
    "text_upper_bound": True,
    "in_distribution": "",
    "crop_border": 0,
    "partner": "text",
    "recall_k": (1, 5, 10),
    "classes": 6,
    "items_per_class": 20,
    "train_source": "",
    "features": "embeds",
    "shots": (1, 5, 10),
    "repeats": 5,
}


def in_todays_fields(given: Mapping[str, Any], known: Collection[str], kind: str) -> dict[str, Any]:
    """Returns the fields of a task under current names, without those of other kinds.

    Args:
      given: fields from a config, a file of tasks or a run's config.json.
      known: names of the fields of `kind`.

    Raises:
      ValueError: a field of other kinds is set, or a field is given under two names.
    """
    fields = {}
    for name, value in given.items():
        new = name if name in known else _RENAMED.get(name, name)
        if new in known:
            if new != name and given.get(new, value) != value:
                raise ValueError(f"{name}={value!r} is the old name of {new}={given[new]!r}")
            if new == name or value:  # an old name with an empty value meant the default
                fields[new] = value
        elif name not in _DEFAULTS:
            fields[name] = value  # the conversion reports the nearest field name
        elif (tuple(value) if isinstance(value, list) else value) != _DEFAULTS[name]:
            raise ValueError(
                f"a {kind} task has no field {name!r}, and {name}={value!r} never had an effect on "
                f"it: leave it out (fields: {', '.join(sorted(known))})"
            )
    return fields
