"""Communication of a compiled program: its collectives, read from the optimised HLO text.

A collective inside a loop counts as often as the loop runs. The bytes sent are those of the
bandwidth-optimal ring algorithms (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms
for clusters of workstations"), per device: (g - 1)/g of the gathered or scattered array in a group
of g, twice that for an all-reduce, and the whole array for a permutation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
    "all-to-all",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([%\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "collective-permute", ...
      executions: number of executions in one run of the program.
      payload_bytes: bytes of one execution on one device: of the array after a gather or before a
          scatter.
      group_size: number of devices in one group.
      name: the operation in the traced function, or "" if the compiler added it.
    """

    kind: str
    executions: int
    payload_bytes: int
    group_size: int
    name: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in all executions."""
        share = (self.group_size - 1) / self.group_size
        factor = {"all-reduce": 2 * share, "collective-permute": min(self.group_size - 1, 1)}
        return self.executions * self.payload_bytes * factor.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind: executions, payload bytes and bytes sent, per device."""

    count: int
    payload_bytes: int
    sent_bytes: float


def traffic(hlo: str) -> dict[str, Traffic]:
    """Returns, by kind of collective, the traffic in one run of the program.

    Args:
      hlo: text of a compiled program, `jitted.lower(...).compile().as_text()`.

    Raises:
      ValueError: the text is not an HLO module, or has a collective that cannot be parsed.
    """
    found = collectives(hlo)
    return {
        kind: _sum(c for c in found if c.kind == kind) for kind in sorted({c.kind for c in found})
    }


def _sum(found: Iterable[Collective]) -> Traffic:
    found = list(found)
    return Traffic(
        sum(c.executions for c in found),
        sum(c.executions * c.payload_bytes for c in found),
        sum(c.sent_bytes for c in found),
    )


def collectives(hlo: str) -> list[Collective]:
    """Returns every collective that one run of the program executes; see `traffic`."""
    entry, computations = _computations(hlo)
    devices = _device_count(hlo)
    return list(_executed(entry, computations, devices, 1))


def executions(hlo: str) -> Iterator[tuple[list[str], int]]:
    """Yields the instructions of the entry and of each loop's body, with their execution counts.

    Bodies of fusions and reductions are left out: a device does not run them separately.
    """
    entry, computations = _computations(hlo)
    yield from _loops(entry, computations, 1)


def _loops(
    name: str, computations: dict[str, list[str]], times: int
) -> Iterator[tuple[list[str], int]]:
    lines = computations.get(name, [])
    yield lines, times
    for line in lines:
        trips = _TRIPS.search(line)
        for role, called in _CALLED.findall(line) if " while(" in line else ():
            if role == "body":
                yield from _loops(called, computations, times * (int(trips[1]) if trips else 1))


def shapes_of(types: str) -> list[tuple[str, int]]:
    """Returns (dtype, bytes) of each array in an instruction's result."""
    return [(dtype, _bytes(dtype, dimensions)) for dtype, dimensions in _SHAPE.findall(types)]


def computations_of(hlo: str) -> dict[str, list[str]]:
    """Returns the instructions of every computation of a module, by name."""
    return _computations(hlo)[1]


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the entry's name, and the instructions of each computation by name."""
    entry, current = "", None
    computations: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            current.append(line)
    if not entry:
        raise ValueError(f"not the text of a compiled HLO module; it begins with {hlo[:80]!r}")
    return entry, computations


def _device_count(hlo: str) -> int:
    header = hlo.split("\n", 1)[0]
    sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    return math.prod(int(size) for size in sizes)


def _executed(
    computation: str, computations: dict[str, list[str]], devices: int, times: int
) -> Iterator[Collective]:
    """Yields the collectives of a computation and of the computations that it calls."""
    for line in computations.get(computation, ()):
        match = _COLLECTIVE.search(line)
        if match and " = " in line[: match.start() + 1]:
            yield _parsed(line, match, devices, times)
        # The end of an asynchronous operation names its computation a second time.
        if "-done(" in line or "-update(" in line:
            continue
        trips = _TRIPS.search(line)
        for role, name in _CALLED.findall(line):
            often = int(trips[1]) if trips and role in ("body", "condition") else 1
            yield from _executed(name, computations, devices, times * often)
        branches = _branches(line)
        taken = [list(_executed(name, computations, devices, times)) for name in branches]
        yield from max(taken, key=lambda found: sum(c.sent_bytes for c in found), default=[])


def _branches(line: str) -> list[str]:
    """Returns the computations of a conditional, one of which is executed."""
    listed = [first or second for first, second in _BRANCHES.findall(line)]
    return [name.strip().lstrip("%") for names in listed for name in names.split(",")]


def _parsed(line: str, match: re.Match[str], devices: int, times: int) -> Collective:
    kind, started = match[1], bool(match[2])
    types = line[line.index(" = ") + 3 : match.start()]
    size = _group_size(line, kind, devices)
    payload = _result_bytes(types, kind, started, size)
    if kind == "reduce-scatter":
        payload *= size
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, times, payload, size, name[1] if name else "")


def _result_bytes(types: str, kind: str, started: bool, group_size: int) -> int:
    """Returns the bytes of the result.

    The types of an asynchronous start also list the operand and contexts; they are not counted.
    """
    shapes = _SHAPE.findall(types)
    if started and kind == "collective-permute":
        return sum(_bytes(*s) for s in shapes if s != ("u32", "")) // 2
    total = sum(_bytes(*shape) for shape in shapes)
    if started and kind == "all-gather":
        return total * group_size // (group_size + 1)
    if started and kind == "reduce-scatter":
        return total // (group_size + 1)
    return total


def _bytes(dtype: str, dimensions: str) -> int:
    if dtype == "token":
        return 0
    bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+", "", dtype).split("e")[0].split("_")[0])
    count = math.prod(int(re.sub(r"\D", "", d)) for d in dimensions.split(",") if d.strip())
    return -(-count * bits // 8)


def _group_size(line: str, kind: str, devices: int) -> int:
    """Returns the number of devices in one group, from any notation that XLA uses for groups."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line[line.index("source_target_pairs=") :])
        return len(pairs) if any(a != b for a, b in pairs) else 1
    if listed := re.search(r"replica_groups=\{(\{[\d,]*\}|\})", line):
        return len(re.findall(r"\d+", listed[1])) or devices
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh[1])}
        axes = re.findall(r"'?([A-Za-z_]\w*)'?(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    raise ValueError(f"cannot read the groups of this collective: {line.strip()[:200]}")
