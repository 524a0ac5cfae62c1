"""Work of a traced step: flops by precision, bytes of its products, what it sends.

Counted in the jaxpr, so exact for matrix products and for loops: XLA's own cost analysis counts
the body of a loop once, whatever its length.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from cwcl_jax.planning.graph import subjaxprs
from cwcl_jax.planning.scores import scores_in_product

PRECISIONS = ("half", "single", "high", "highest")
_SENDING = (
    "all_gather",
    "psum_scatter",
    "reduce_scatter",
    "psum",
    "ppermute",
    "pmax",
    "all_to_all",
)


def _sums() -> dict[Any, float]:
    return collections.defaultdict(float)


@dataclasses.dataclass
class Work:
    """What one device does in one step, if the devices share the work evenly.

    Attributes:
      flops: of products, by precision: "half", "single" (float32, default), "high", "highest"
        (float32 too).
      elementwise: elements that all other operations make.
      product_bytes: operands and results of products.
      score_bytes: of these, attention's tokens x tokens arrays, by the number of tokens.
      score_flops: of the float32 products ("single") that they take part in, by the same number.
      sent: bytes that explicit collectives (those of the loss) send, by kind. A gather that the
        backward pass repeats counts once: the compiler joins the two.
      endless: loops without a known length, counted once.
      gathered: bytes sent by gathers, by the shape and type of what is gathered.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=_sums)
    elementwise: float = 0.0
    product_bytes: float = 0.0
    score_bytes: dict[int, float] = dataclasses.field(default_factory=_sums)
    score_flops: dict[int, float] = dataclasses.field(default_factory=_sums)
    sent: dict[str, float] = dataclasses.field(default_factory=_sums)
    endless: int = 0
    gathered: dict[tuple, float] = dataclasses.field(default_factory=_sums)

    @property
    def total_flops(self) -> float:
        """Of all products."""
        return float(sum(self.flops.values()))


def count_work(function: Callable[..., Any], *arguments: Any, devices: int) -> Work:
    """The work of `function` for abstract global arguments, per device."""
    work = Work()
    _count(jax.make_jaxpr(function)(*arguments).jaxpr, 1 / devices, devices, work)
    if work.gathered:
        work.sent["all_gather"] += sum(work.gathered.values())
    return work


def _count(jaxpr: Any, times: float, devices: int, work: Work) -> None:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            _count_product(equation, times, work)
        elif name == "conv_general_dilated":
            _count_convolution(equation, times, work)
        elif name == "all_gather":
            aval = equation.invars[0].aval
            work.gathered[aval.shape, str(aval.dtype)] += times * _sent_bytes(
                equation, name, devices
            )
        elif name in _SENDING:
            work.sent[name] += times * _sent_bytes(equation, name, devices)
        elif name == "shard_map":
            before, work.gathered = work.gathered, _sums()
            for body in subjaxprs(equation):  # whose shapes are those of one device
                _count(body, times * devices, devices, work)
            for what, size in work.gathered.items():
                before[what] = max(before[what], size)
            work.gathered = before
        else:
            inner = list(subjaxprs(equation))
            if not inner:
                work.elementwise += times * sum(math.prod(v.aval.shape) for v in equation.outvars)
            for body in inner if name != "cond" else inner[:1]:
                _count(body, times * _repeats(equation, work), devices, work)


def _repeats(equation: Any, work: Work) -> float:
    """How often an operation runs its body."""
    name = equation.primitive.name
    if name == "scan":
        return equation.params["length"]
    if name == "while":
        work.endless += 1
    return 1


def _count_product(equation: Any, times: float, work: Work) -> None:
    (contracting, _), _ = equation.params["dimension_numbers"]
    left, right = (atom.aval for atom in equation.invars)
    out = equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracting)
    flops, precision = times * 2 * math.prod(out.shape) * depth, _precision(equation, left)
    work.flops[precision] += flops
    scores = scores_in_product(equation)
    for place, aval in enumerate((left, right, out)):
        size = times * math.prod(aval.shape) * aval.dtype.itemsize
        work.product_bytes += size
        if place == scores:
            work.score_bytes[aval.shape[-1]] += size
            work.score_flops[aval.shape[-1]] += flops if precision == "single" else 0


def _count_convolution(equation: Any, times: float, work: Work) -> None:
    left, kernel = (atom.aval for atom in equation.invars)
    out = equation.outvars[0].aval
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    depth = math.prod(kernel.shape) // features
    work.flops[_precision(equation, left)] += times * 2 * math.prod(out.shape) * depth
    for aval in (left, kernel, out):
        work.product_bytes += times * math.prod(aval.shape) * aval.dtype.itemsize


def _precision(equation: Any, operand: Any) -> str:
    if operand.dtype.itemsize <= 2:
        return "half"
    chosen = equation.params.get("precision")
    first = chosen[0] if isinstance(chosen, tuple) else chosen
    named = {jax.lax.Precision.HIGH: "high", jax.lax.Precision.HIGHEST: "highest"}
    return named.get(first, "single")


def _sent_bytes(equation: Any, name: str, devices: int) -> float:
    """What one device sends: as the bandwidth-optimal ring algorithms do."""
    sizes = [
        math.prod(atom.aval.shape) * atom.aval.dtype.itemsize
        for atom in equation.invars
        if not isinstance(atom, core.Literal)
    ]
    own, others = sum(sizes), devices - 1
    factor = {
        "all_gather": others,  # of its own part to each of the others
        "psum": 2 * others / devices,
        "pmax": 2 * others / devices,
        "ppermute": min(others, 1),
    }.get(name, others / devices)
    return own * factor
