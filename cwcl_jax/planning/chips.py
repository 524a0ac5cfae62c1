"""Accelerators as their data sheets describe them, and meshes of them by name.

Peaks are those of dense matrix products. Every row names the source of its numbers. A program
usually reaches only part of these peaks.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

from cwcl_jax.config import ConfigError

_GB, _GIB, _TERA = 10**9, 2**30, 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      memory: bytes.
      half: flop/s of bfloat16 products.
      single: flop/s of float32 products at JAX's default precision (TF32; one bfloat16 pass).
      high: flop/s of float32 products at precision "high" (three of these passes).
      highest: flop/s of float32 products at precision "highest" (no tensor cores; six passes).
      bandwidth: bytes/s between memory and chip.
      link: bytes/s that one chip sends to the others of its island.
      island: number of chips that are joined by such links: an NVLink node, a pod.
      network: bytes/s that one chip sends out of its island.
      is_gpu: whether it is an NVIDIA GPU: cuDNN's attention stores no tokens x tokens array, and
          XLA compiles differently.
      source: where the numbers are published.
    """

    name: str
    memory: int
    half: float
    single: float
    high: float
    highest: float
    bandwidth: float
    link: float
    island: int
    network: float
    is_gpu: bool
    source: str

    def sends(self, devices: int) -> float:
        """Returns the bytes/s that each of `devices` chips can send at once."""
        return self.link if devices <= self.island else min(self.link, self.network)


def _gpu(name, memory, half, single, highest, bandwidth, link, network, source) -> Chip:
    """Returns a GPU in nodes of eight with one network card per GPU, as in NVIDIA's DGX."""
    return Chip(
        name, memory * _GB, half * _TERA, single * _TERA, single * _TERA / 3, highest * _TERA,
        bandwidth * _GB, link * _GB, 8, network * _GB, True, source,
    )  # fmt: skip


def _tpu(name, memory, half, bandwidth, link, pod, network, source) -> Chip:
    """Returns a TPU, which multiplies float32 in one, three or six bfloat16 passes."""
    return Chip(
        name, memory * _GIB, half * _TERA, half * _TERA, half * _TERA / 3, half * _TERA / 6,
        bandwidth * _GB, link * _GB, pod, network * _GB, False, source,
    )  # fmt: skip


_A100 = "NVIDIA A100 data sheet (SXM); DGX A100: 200 Gb/s per GPU"
_H100 = "NVIDIA H100 data sheet (SXM), dense; DGX H100: 400 Gb/s per GPU"
_H200 = "NVIDIA H200 data sheet (SXM), dense; DGX H200: 400 Gb/s per GPU"
_TPU = "cloud.google.com/tpu/docs/"

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _gpu("a100-40", 40, 312, 156, 19.5, 1555, 300, 25, _A100),
        _gpu("a100-80", 80, 312, 156, 19.5, 2039, 300, 25, _A100),
        _gpu("h100", 80, 989, 495, 67, 3350, 450, 50, _H100),
        _gpu("h200", 141, 989, 495, 67, 4800, 450, 50, _H200),
        # Network of TPUs: the bandwidth of the host's network cards divided by its chips.
        _tpu("v4", 32, 275, 1200, 300, 4096, 6.25, _TPU + "v4; network as v5p (not published)"),
        _tpu("v5e", 16, 197, 819, 200, 256, 3.125, _TPU + "v5e, v6e"),
        _tpu("v5p", 95, 459, 2765, 600, 8960, 6.25, _TPU + "v5p"),
        _tpu("v6e", 32, 918, 1640, 448, 256, 12.5, _TPU + "v6e"),
    )
}
_ALIASES = {"a100": "a100-80", "tpu-v4": "v4", "tpu-v5e": "v5e", "tpu-v5p": "v5p", "tpu-v6e": "v6e"}
# For these, names of Google's slices count TensorCores, of which a chip has two; for v5e and v6e
# they count chips (cloud.google.com/tpu/docs).
_NAMED_BY_CORES = ("v4", "v5p")
# The size of the largest pods. The planner creates all devices; more would take it minutes.
_MOST_DEVICES = 10_000


# Names of chips in their drivers. GPUs of smaller boards (PCIe, NVL) have other peaks and are left
# out.
_KINDS = {
    "nvidia a100-sxm4-40gb": "a100-40", "nvidia a100-sxm4-80gb": "a100-80",
    "nvidia h100 80gb hbm3": "h100", "nvidia h200": "h200", "tpu v4": "v4", "tpu v5 lite": "v5e",
    "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p", "tpu v6 lite": "v6e", "tpu v6e": "v6e",
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of JAX's `device_kind`, or None if its peaks are not in the table."""
    name = _KINDS.get(device_kind.lower())
    return None if name is None else CHIPS[name]


def parse_mesh(text: str) -> tuple[Chip, int]:
    """Returns chip and number of devices of `a100x4`, `a100 x4`, `v5e:256` or `h100`.

    Raises:
      ConfigError: there is no such chip (names the nearest), or the number of devices is out of
          range.
    """
    match = re.fullmatch(r"([a-z0-9\-]+?)(?:\s*[x:]\s*(\d+))?", text.strip().lower())
    name = match[1] if match else text
    chip = _chip(name)
    if match is None or chip is None:
        raise ConfigError(
            f"--mesh={text}: unknown chip; {_hint(name)}known: {', '.join(_known())}; append the "
            "number of devices, as in a100x4"
        )
    devices = int(match[2] or 1)
    if not 1 <= devices <= _MOST_DEVICES:
        raise ConfigError(f"--mesh={text}: a mesh has 1 to {_MOST_DEVICES:,} devices here")
    return chip, devices


def _chip(name: str) -> Chip | None:
    return CHIPS.get(_ALIASES.get(name, name))


def _known() -> list[str]:
    return sorted([*CHIPS, *_ALIASES])


def _hint(name: str) -> str:
    """Returns a suggestion: a slice as Google writes it (v5e-64), or the nearest name."""
    start, _, number = name.rpartition("-")
    if number.isdecimal() and (chip := _chip(start)) is not None:
        if chip.name in _NAMED_BY_CORES:
            return f"did you mean '{start}x{int(number) // 2}' (its name counts two cores a chip)? "
        return f"did you mean '{start}x{number}'? "
    near = difflib.get_close_matches(name, _known(), n=1, cutoff=0.3)
    return f"did you mean {near[0]!r}? " if near else ""
