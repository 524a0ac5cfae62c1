"""Which leaves are trained: Table 6 of the CWCL paper, LiT's L/U/u (arXiv 2111.07991), and between.

Every leaf gets exactly one decision from its tower's `tune`:

    all      the encoder and the head, except tables that the encoder's family has fixed
    none     nothing: a locked tower
    head     the head; the encoder is locked
    last:K   the top K blocks, everything after them (final norm, pooling), and the head
    regexes  separated by commas; full matches on paths below the tower, such as
             `encoder/blocks/1[01]/.*,head/.*`

`lora:R`, appended to one of these with a plus, or alone (for `none+lora:R`), changes nothing here:
it adds leaves to kernels that do not train, see `lora`.
"""

import re
from collections.abc import Iterable, Mapping

from cwcl_jax.models.encoders import fixed_leaves
from cwcl_jax.models.lora import split_tune
from cwcl_jax.models.tower import TowerConfig

_TOWER_PATH = re.compile(r"towers/([^/]+)/(.+)")
_BLOCK_PATH = re.compile(r"encoder/blocks/(\d+)/.*")
_STACKED_PATH = re.compile(r"encoder/blocks/[a-z].*")
_AFTER_BLOCKS = re.compile(r"(encoder/(norm|pooler|pooling|dense)|head)/.*")
LOGIT_PATHS = ("logit_scale", "logit_bias")


def decide(paths: Iterable[str], towers: Mapping[str, TowerConfig]) -> dict[str, bool]:
    """Returns for every path whether it is trained. Logit scale and bias always are."""
    decisions: dict[str, bool] = {}
    below: dict[str, list[str]] = {modality: [] for modality in towers}
    for path in paths:
        match = _TOWER_PATH.fullmatch(path)
        if path in LOGIT_PATHS:
            decisions[path] = True
        elif match and match[1] in below:
            below[match[1]].append(match[2])
        else:
            raise ValueError(
                f"leaf {path!r} belongs to no tower; the towers are {', '.join(towers)}"
            )
    for modality, names in below.items():
        try:
            trained = _trained(names, towers[modality])
        except ValueError as error:
            raise ValueError(f"towers.{modality}.tune: {error}") from error
        decisions.update({f"towers/{modality}/{name}": name in trained for name in names})
    return decisions


def _trained(names: list[str], tower: TowerConfig) -> set[str]:
    """Returns the trained ones among the paths of one tower."""
    tune, _ = split_tune(tower.tune)
    if tune == "all":
        return set(names) - set(fixed_leaves(tower.encoder))
    if tune == "none":
        return set()
    if tune == "head":
        return {name for name in names if name.startswith("head/")}
    if tune.startswith("last:"):
        return _top_blocks(names, tune)
    trained: set[str] = set()
    for pattern in (part.strip() for part in tune.split(",")):
        try:
            matched = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if not matched:
            raise ValueError(
                f"{pattern!r} is not one of all, none, head, last:K, lora:R, and as a regex it "
                f"matches no leaf below the tower; paths look like {', '.join(names[:3])}"
            )
        trained |= matched
    return trained


def _top_blocks(names: list[str], tune: str) -> set[str]:
    """Returns the paths that `last:K` unlocks."""
    count = tune.removeprefix("last:")
    blocks = {name: int(m[1]) for name in names if (m := _BLOCK_PATH.fullmatch(name))}
    depth = 1 + max(blocks.values(), default=-1)
    if depth == 0 and any(_STACKED_PATH.fullmatch(name) for name in names):
        raise ValueError(f"{tune!r} needs separate layers: set scan_layers=False for this tower")
    if not depth:
        raise ValueError(
            f"{tune!r} counts blocks, and this encoder has none that are known: name leaves by a "
            f"regex; paths look like {', '.join(names[:3])}"
        )
    if not count.isdecimal() or not 0 <= int(count) <= depth:
        raise ValueError(f"K of last:K is a number from 0 to {depth} (the depth), not {count!r}")
    top = {name for name, index in blocks.items() if index >= depth - int(count)}
    return top | {name for name in names if _AFTER_BLOCKS.fullmatch(name)}
