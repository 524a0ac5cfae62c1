"""Flops of a compiled program's matrix products, loops included, from its optimised HLO text.

XLA's cost analysis counts the body of a loop once. Here a body counts as often as its loop runs,
where the compiler knows how often that is.
"""

from __future__ import annotations

import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?[a-z]+\d*\w*\[([\d,]*)\]")
_DOT = re.compile(r" dot\(%?([\w.\-]+)(?:,| )")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)")


def product_flops(hlo: str) -> float:
    """Flops of all `dot`s of one run of the program, on one device."""
    entry, computations = _computations(hlo)
    own = {name: sum(map(float, _dots(lines))) for name, lines in computations.items()}
    memo: dict[str, float] = {}

    def total(name: str) -> float:
        if name not in memo:
            memo[name] = own.get(name, 0.0) + sum(
                times * total(called) for called, times in _calls(computations.get(name, []))
            )
        return memo[name]

    return total(entry)


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    entry, current = "", None
    computations: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations.setdefault(header[1], [])
                entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        else:
            current.append(line)
    if not entry:
        raise ValueError(f"not the text of a compiled HLO module; it begins with {hlo[:80]!r}")
    return entry, computations


def _calls(lines: list[str]) -> list[tuple[str, int]]:
    """Computations that are called, and how often."""
    calls = []
    for line in lines:
        trips = _TRIPS.search(line)
        for role, name in _CALLED.findall(line):
            looped = trips is not None and role in ("body", "condition")
            calls.append((name, int(trips[1]) if looped and trips else 1))
    return calls


def _dots(lines: list[str]) -> list[int]:
    """Flops of each product of one computation."""
    shapes = {}
    for line in lines:
        result = _RESULT.match(line)
        if result:
            shapes[result[1]] = [int(size) for size in result[2].split(",") if size]
    flops = []
    for line in lines:
        dot, contracting = _DOT.search(line), _CONTRACTING.search(line)
        if dot and contracting:
            out = _RESULT.match(line)
            left = shapes[dot[1]]
            depth = math.prod(left[int(axis)] for axis in contracting[1].split(",") if axis)
            flops.append(2 * math.prod(shapes[out[1]]) * depth if out else 0)
    return flops
