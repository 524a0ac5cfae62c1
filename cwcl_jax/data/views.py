"""The inputs of an example that training draws from, if there is a list of them.

These are its captions, or `views=K` inputs of a tower: the view that evaluation sees and K - 1
random ones. The random views depend only on the example's id. They are the same for every seed,
epoch and place in the data, so that a feature cache can hold them; the run's seed determines which
of them a step reads.
"""

import hashlib
from typing import Any

import numpy as np

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import Source
from cwcl_jax.modalities import Modality, stream_of
from cwcl_jax.modalities.base import prepared

# Separates these random streams from the pipeline's.
_VIEWS = 22
# Whether examples have several variants depends on the source; a few examples suffice to see it.
_LOOKED_AT = 100


def drawn_input(tower: str, modality: Modality, value: Any, name: str, draws: Draws | None) -> Any:
    """Returns the prepared input of the example `name`: drawn, or evaluation's without `draws`."""
    if draws is not None and modality.views:
        draws = _view(tower, modality, name, draws.below(modality.views))
    return prepared(modality, value, draws)


def every_input(tower: str, modality: Modality, value: Any, name: str) -> list[Any]:
    """Returns all prepared inputs from which `drawn_input` draws; evaluation's is first."""
    if modality.views:
        views = [_view(tower, modality, name, number) for number in range(modality.views)]
        return [prepared(modality, value, draws) for draws in views]
    return [prepared(modality, variant) for variant in modality.variants(value)]


def _view(tower: str, modality: Modality, name: str, number: int) -> Draws | None:
    """Returns the random numbers of a view; None for the first, which is evaluation's."""
    if not number:
        return None
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return Draws(_VIEWS, int.from_bytes(digest), number, *stream_of(tower, modality))


def kept_draws(tower: str, modality: Modality) -> dict[str, Any]:
    """Returns what determines `every_input` besides evaluation's options; {} for one input each."""
    if modality.views:
        return {"views": modality.fingerprint(), "stream": list(stream_of(tower, modality))}
    several = type(modality).variants is not Modality.variants
    return {"variants": "all"} if several else {}


def with_several_variants(source: Source, modality: Modality) -> str:
    """Returns a note on an example with several variants, from a sample; "" if there is none."""
    for index in np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT)).astype(int):
        try:
            example = source.read(int(index), (modality.field,))
            variants = modality.variants(example.get(modality.field) or "")
        except BadExample:
            continue
        if len(set(variants)) > 1:
            return f"{example['id']} has {len(variants)}"
    return ""
