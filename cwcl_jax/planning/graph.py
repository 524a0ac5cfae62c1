"""A traced function as a flat graph of values, with nested calls inlined.

What JAX's jaxprs leave to the reader: which value comes from which operation, through however
many layers of `jit`, `checkpoint` and custom rules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from cwcl_jax.planning.scores import RESULT, is_scores, scores_in_product

# Operations that run other functions in a way that matters (loops, branches, devices) stay nodes.
_NOT_INLINED = ("scan", "while", "cond", "shard_map")


@dataclasses.dataclass(eq=False)
class Value:
    """One array of a traced function.

    Attributes:
      operation: name of the primitive that makes it, "input" for arguments and constants.
      operands: what it is made of; literals are left out.
      aval: shape and type.
      is_scores: whether it is attention's tokens x tokens array.
    """

    operation: str
    operands: tuple[Value, ...]
    aval: Any
    is_scores: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.aval.shape)

    @property
    def bytes(self) -> int:
        """Bytes; keys of random numbers count as eight."""
        return self.size * getattr(self.aval.dtype, "itemsize", 8)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Attributes:
    outputs: of the function; None where one is a literal.
    values: all values in the order of their operations.
    """

    outputs: list[Value | None]
    values: list[Value]


def trace(function: Callable[..., Any], *arguments: Any) -> Graph:
    """The graph of `function` for abstract arguments; nothing is computed."""
    closed = jax.make_jaxpr(function)(*arguments)
    values: list[Value] = []
    environment = {var: Value("input", (), var.aval) for var in closed.jaxpr.invars}
    _walk(closed.jaxpr, environment, values)
    return Graph([_read(environment, out) for out in closed.jaxpr.outvars], values)


def _read(environment: dict[Any, Value], atom: Any) -> Value | None:
    return None if isinstance(atom, core.Literal) else environment[atom]


def _walk(jaxpr: Any, environment: dict[Any, Value], values: list[Value]) -> None:
    for var in jaxpr.constvars:
        environment.setdefault(var, Value("input", (), var.aval))
    for equation in jaxpr.eqns:
        operands = [_read(environment, atom) for atom in equation.invars]
        inner = inlined(equation)
        if inner is not None:
            bound = {
                var: value if value is not None else Value("literal", (), var.aval)
                for var, value in zip(inner.invars, operands, strict=True)
            }
            _walk(inner, bound, values)
            for var, atom in zip(equation.outvars, inner.outvars, strict=True):
                environment[var] = _read(bound, atom) or Value("literal", (), var.aval)
            continue
        known = tuple(value for value in operands if value is not None)
        for var in equation.outvars:
            scores = _makes_scores(equation, known, var.aval.shape)
            environment[var] = Value(equation.primitive.name, known, var.aval, scores)
            values.append(environment[var])


def _makes_scores(equation: Any, operands: tuple[Value, ...], shape: tuple[int, ...]) -> bool:
    """By the product; elementwise, of what was scores before."""
    if equation.primitive.name == "dot_general":
        return scores_in_product(equation) == RESULT
    made = (value for value in operands if value.operation not in ("input", "literal"))
    return is_scores(shape) and all(v.is_scores for v in made if v.aval.shape == shape)


def inlined(equation: Any) -> Any:
    """The jaxpr that an operation merely calls, or None."""
    if equation.primitive.name in _NOT_INLINED:
        return None
    inner = [jaxpr for jaxpr in subjaxprs(equation) if len(jaxpr.invars) == len(equation.invars)]
    return inner[0] if inner and len(inner[0].outvars) == len(equation.outvars) else None


def subjaxprs(equation: Any) -> Iterator[Any]:
    """All jaxprs among an operation's parameters."""
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
