"""What a tower keeps between its forward and its backward pass, from its own derivative.

`jax.vjp` says which values the backward pass reads. A compiler does not store all of them: chains
of elementwise operations are fused into their readers and computed again from what is in memory
anyway, which are the results and operands of matrix products. For a plain transformer block this
gives 16 arrays of the token shape, the count of Korthikanti et al. 2022 (arXiv 2205.05198,
section 4.1, without dropout masks).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from cwcl_jax.planning.graph import Graph, Value, trace

# Results that are in memory, whoever reads them; all else is fused into its readers.
_STORED = (
    "dot_general",
    "conv_general_dilated",
    "gather",
    "scan",
    "while",
    "cond",
    "cumsum",
    "sort",
    "fft",
)
_RESHAPING = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "stop_gradient", "name")
_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "random_wrap", "random_unwrap")


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that stay until the backward pass.

    Attributes:
      scores: of attention's logits and weights, (batch, heads, tokens, tokens).
      other: of everything else.
      largest: of the largest single array, a measure of what a backward pass needs besides.
    """

    scores: int
    other: int
    largest: int


def kept_for_backward(function: Callable[..., Any], params: Any, *rest: Any) -> Kept:
    """What `function(params, *rest)` keeps for its gradient by `params`; all are abstract.

    The arguments themselves are not counted.
    """

    def residuals(params: Any, *rest: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda p: function(p, *rest), params)[1])

    graph = trace(residuals, params, *rest)
    stored = _materialised(graph)
    found: dict[int, Value] = {}
    memo: dict[int, list[Value]] = {}
    for output in graph.outputs:
        if output is not None:
            found |= {id(value): value for value in _sources(output, stored, memo)}
    scores = [value.bytes for value in found.values() if value.is_scores]
    other = [value.bytes for value in found.values() if not value.is_scores]
    return Kept(sum(scores), sum(other), max(other, default=0))


def _materialised(graph: Graph) -> set[int]:
    """Operands of matrix products: a product cannot be fused with what computes its operands."""
    stored = set()
    for value in graph.values:
        if value.operation in ("dot_general", "conv_general_dilated"):
            stored |= {id(_base(operand)) for operand in value.operands}
    return stored


def _base(value: Value) -> Value:
    """The array behind views of another shape."""
    while value.operation in _RESHAPING and value.operands:
        value = value.operands[0]
    return value


def _sources(value: Value, stored: set[int], memo: dict[int, list[Value]]) -> list[Value]:
    """The arrays in memory from which `value` can be computed again."""
    value = _base(value)
    if id(value) not in memo:
        memo[id(value)] = _unmemoised_sources(value, stored, memo)
    return memo[id(value)]


def _unmemoised_sources(
    value: Value, stored: set[int], memo: dict[int, list[Value]]
) -> list[Value]:
    if value.operation in ("input", "literal"):
        return []
    if id(value) in stored or value.operation in _STORED or value.operation.startswith("reduce_"):
        return [value]
    if value.operation in _RANDOM:
        return [value]
    found = {id(x): x for operand in value.operands for x in _sources(operand, stored, memo)}
    # Random bits are not drawn again: the mask made of them is kept.
    if value.aval.dtype == bool and any(x.operation in _RANDOM for x in found.values()):
        return [value]
    return list(found.values())
