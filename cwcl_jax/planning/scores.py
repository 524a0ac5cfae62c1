"""Which arrays of a traced attention are its scores: logits and weights, tokens x tokens.

By their shape; where a head is as wide as the text is long, by the products that they take part in.
"""

from __future__ import annotations

from typing import Any

LEFT, RIGHT, RESULT = range(3)


def is_scores(shape: tuple[int, ...]) -> bool:
    """Whether an array is (batch, heads, tokens, tokens), with or without an axis of one."""
    kept = (*shape[:2], *(size for size in shape[2:] if size != 1))
    return len(kept) >= 4 and kept[-1] == kept[-2]


def scores_in_product(equation: Any) -> int | None:
    """Which array of a `dot_general` is the scores: 0 and 1 its operands, 2 its result.

    One array at most: products of attention make scores of two others, or apply them to another.
    """
    arrays = [atom.aval for atom in (*equation.invars, *equation.outvars)]
    found = [place for place, array in enumerate(arrays) if is_scores(array.shape)]
    if len(found) <= 1:
        return found[0] if found else None
    # The results of weights and values look like scores too. Queries, keys and values are (batch,
    # tokens, heads, head size): contracted over heads they give scores, over tokens they meet them.
    contracting, batch = equation.params["dimension_numbers"]
    for place, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
        if tuple(batch[place]) == (0, 2):
            return other if 1 in contracting[place] else RESULT
    return next(place for place in (RIGHT, LEFT) if place in found)
