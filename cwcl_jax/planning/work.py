"""Counts the work of a traced step: flops by precision, bytes touched by products, operations.

It is counted in the jaxpr, so it is exact for matrix products and loops. XLA's own cost analysis
counts the body of a loop once, whatever its length; the loss, an accumulated batch and scanned
layers are loops.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

PRECISIONS = ("half", "single", "high", "highest")
# cuDNN's attention: two products forward; backward the scores again and four gradients.
_ATTENTION_PRODUCTS = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}


@dataclasses.dataclass
class Work:
    """What one device does in one step, if the devices share the work evenly.

    Attributes:
      flops: flops of products, by precision: "half", "single" (float32, default), "high", "highest"
          (float32 too).
      touched: bytes of the operands and results of products.
      operations: how often each operation occurs in the program; bodies of loops count once.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    touched: float = 0.0
    operations: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def total_flops(self) -> float:
        """Flops of all products."""
        return float(sum(self.flops.values()))

    @property
    def fused_attentions(self) -> int:
        """Number of calls of cuDNN's attention in a forward pass."""
        return sum(n for name, n in self.operations.items() if _attention(name) == 2)

    def add_product(self, flops: float, precision: str, touched: float) -> None:
        """Adds one product."""
        self.flops[precision] = self.flops.get(precision, 0.0) + flops
        self.touched += touched


def count_work(function: Callable[..., Any], *arguments: Any, devices: int) -> Work:
    """Returns the work of `function` for abstract global arguments, per device."""
    work = Work()
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    # What nothing reads is not computed, such as the gradient of a kernel that does not train.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    _count(jaxpr, 1 / devices, devices, work)
    return work


def _count(jaxpr: Any, times: float, devices: int, work: Work) -> None:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        work.operations[name] += 1
        if name == "dot_general":
            _count_product(equation, times, work)
        elif name == "conv_general_dilated":
            _count_convolution(equation, times, work)
        elif _attention(name):
            _count_attention(equation, times, work)
        else:
            # Shapes in a shard_map are those of one device. Of the branches of a cond, the first is
            # counted.
            scale = {"scan": equation.params.get("length"), "shard_map": devices}.get(name) or 1
            bodies = list(_subjaxprs(equation))
            for body in bodies[:1] if name == "cond" else bodies:
                _count(body, times * scale, devices, work)


def _subjaxprs(equation: Any) -> Iterator[Any]:
    """Yields all jaxprs among an operation's parameters."""
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _attention(name: str) -> int:
    """Returns the number of products in cuDNN's kernel of that name, 0 for other operations."""
    return _ATTENTION_PRODUCTS.get(name.removesuffix("_wrapper"), 0)


def _count_attention(equation: Any, times: float, work: Work) -> None:
    """Adds the products of an attention kernel.

    Its operands begin with query, key and value, (batch, tokens, heads, head size).
    """
    query, key = (atom.aval.shape for atom in equation.invars[:2])
    flops = _attention(equation.primitive.name) * 2 * math.prod(query) * key[1]
    work.add_product(times * flops, "half", times * _bytes(equation))


def _count_product(equation: Any, times: float, work: Work) -> None:
    (contracting, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracting)
    flops = times * 2 * math.prod(out.shape) * depth
    work.add_product(flops, _precision(equation, left), times * _bytes(equation))


def _count_convolution(equation: Any, times: float, work: Work) -> None:
    left, kernel = (atom.aval for atom in equation.invars)
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    depth = math.prod(kernel.shape) // features
    flops = times * 2 * math.prod(equation.outvars[0].aval.shape) * depth
    work.add_product(flops, _precision(equation, left), times * _bytes(equation))


def _bytes(equation: Any) -> int:
    avals = [atom.aval for atom in (*equation.invars, *equation.outvars)]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)


def _precision(equation: Any, operand: Any) -> str:
    if operand.dtype.itemsize <= 2:
        return "half"
    chosen = equation.params.get("precision")
    first = chosen[0] if isinstance(chosen, tuple) else chosen
    named = {
        jax.lax.Precision.HIGH: "high",
        jax.lax.Precision.HIGHEST: "highest",
        jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3: "high",
    }
    return named.get(first, "single")
