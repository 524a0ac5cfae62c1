"""Computes the bytes that the loss moves per logit on a chip: python -m cwcl_jax.benchmarks.tiles.

The loss's value and gradient are compiled for a chip that may be absent (extra `plan`), and the
program is parsed. Every array of at least a mebibyte that an operation reads or writes counts, as
often as its loop runs: tiles of logits, and the gradients that they are added to. The table also
has the flops per byte, and the flops per byte at which memory and products of the chip take equally
long (ridge). Tiles and gradients that fit together into L2 move at its speed, about twice that of
the memory.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

from cwcl_jax import cli
from cwcl_jax.benchmarks.harness import markdown
from cwcl_jax.config import ConfigError
from cwcl_jax.losses.presets import PRESETS
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.collectives import computations_of, executions, shapes_of

COLUMNS = (
    "chip", "loss", "n", "d", "dtype", "tile", "tile_mib", "bytes_a_logit", "written",
    "flops_a_byte", "ridge",
)  # fmt: skip
# Smaller arrays, such as sums of rows, stay in the caches.
_LEAST_BYTES = 2**20
# Operations that move nothing, or only rename a part of another operation's result.
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


def loss_program(chip: Any, loss: str, n: int, d: int, dtype: str, block: tuple[int, int]) -> str:
    """Returns the text of the compiled value and gradient of a tiled loss, by u and v."""
    import jax
    import jax.numpy as jnp

    from cwcl_jax.losses import LossConfig, make_loss
    from cwcl_jax.planning.targets import as_on, chip_devices, compiler_options

    (device,) = chip_devices(chip, 1)
    config = LossConfig(
        name=loss, form="fused", block_size=block[0], block_columns=block[1], diagnostics=False
    )
    function = make_loss(config)

    def total(u: jax.Array, v: jax.Array) -> jax.Array:
        p, q = jax.lax.stop_gradient((u, v))
        labels = jnp.arange(n, dtype=jnp.int32) // 10
        return function(u, v, p, jnp.float32(2.66), -10.0, labels=labels, q=q)[0]

    one = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((n, d), jnp.dtype(dtype), sharding=one)
    with as_on(chip):
        lowered = jax.jit(jax.value_and_grad(total, (0, 1))).lower(x, x)
        text = lowered.compile(compiler_options(chip)).as_text()
    assert text is not None  # all of XLA's compilers provide it
    return text


def traffic_of(hlo: str, least: int) -> tuple[float, float]:
    """Returns the bytes that one run of a program reads and writes.

    Only arrays of at least `least` bytes count. A fusion that takes a slice of an array reads the
    slice; one that updates a slice in place writes the slice. A library's kernel reads its operands
    and writes its result.
    """
    computations = computations_of(hlo)
    read = written = 0.0
    for lines, times in executions(hlo):
        sizes: dict[str, int] = {}
        for line in lines:
            match = _LINE.match(line)
            if match is None:
                continue
            name, result, operation, rest = match.groups()
            # A kernel's scratch space has dtype s8 and is listed with its result.
            size = sum(size for kind, size in shapes_of(result) if kind != "s8" and size >= least)
            sizes[name] = size
            if operation in _FREE:
                continue
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            whole = [(sizes.get(o, 0), sizes.get(o, 0)) for o in operands]
            called = re.search(r"calls=%?([\w.\-]+)", line)
            if operation == "fusion" and called:
                whole, size = _inside(computations[called[1]], whole, size)
            read += times * sum(part for part, all_ in whole if all_)
            written += times * size
    return read, written


def _inside(
    lines: list[str], operands: list[tuple[int, int]], size: int
) -> tuple[list[tuple[int, int]], int]:
    """Returns what a fusion reads of its operands, (bytes, whole size) each, and what it writes."""
    parsed = [match.groups() for match in map(_LINE.match, lines) if match]
    results = {name: sum(s for _, s in shapes_of(result)) for name, result, *_ in parsed}

    def users(name: str) -> Iterator[tuple[str, str, list[str]]]:
        for user, _, operation, rest in parsed:
            given = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            if name in given:
                if operation == "bitcast":
                    yield from users(user)
                else:
                    yield user, operation, given

    found = list(operands)
    for name, _, operation, rest in parsed:
        number = rest.split(")")[0]
        if operation != "parameter" or not operands[int(number)][1]:
            continue
        part = 0
        for user, how, given in users(name):
            if how == "dynamic-slice":
                part += results[user]
            elif how != "dynamic-update-slice" or given[0] != name:
                part = operands[int(number)][1]
                break
        found[int(number)] = (min(part, operands[int(number)][1]), operands[int(number)][1])
    updates = [
        re.findall(r"%([\w.\-]+)", rest)[1]
        for _, _, operation, rest in parsed
        if operation == "dynamic-update-slice"
    ]
    return found, min(size, sum(results[update] for update in updates)) if updates else size


def measure(chip: Any, loss: str, n: int, d: int, dtype: str, block: tuple[int, int]) -> dict:
    """Returns one row of the table."""
    import jax.numpy as jnp

    from cwcl_jax.losses.tiles import Tiling
    from cwcl_jax.planning.targets import as_on

    with as_on(chip):
        rows, columns = Tiling(block_size=block[0], block_columns=block[1]).tile(n, n, 4)
    read, written = traffic_of(loss_program(chip, loss, n, d, dtype, block), _LEAST_BYTES)
    every = (read + written) / float(n * n)
    half = jnp.dtype(dtype).itemsize == 2
    return {
        "chip": chip.name, "loss": loss, "n": n, "d": d, "dtype": dtype,
        "tile": f"{rows}x{columns}",
        "bytes_a_logit": every,
        "written": written / float(n * n),
        "tile_mib": rows * columns * 4 / 2**20,
        "flops_a_byte": 8 * d / every if every else math.inf,
        "ridge": (chip.half if half else chip.highest) / chip.bandwidth,
    }  # fmt: skip


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Yields the tile sizes; (0, 0), written "default", is the package's choice."""
    for part in text.split(","):
        yield (0, 0) if part == "default" else cli.sizes(part)[0]


def _define(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--chips", type=cli.names(list(CHIPS)), default="h100", help="chips to compile for")
    add("--losses", type=cli.names(list(PRESETS)), default="cwcl", help="names of losses")
    add("--sizes", type=cli.sizes, default="16384x768", help="N x d, comma-separated")
    dtypes = cli.names(["float32", "bfloat16"])
    add("--dtypes", type=dtypes, default="bfloat16,float32", help="dtypes of the embeddings")
    add("--tiles", default="default", help="rows x columns, or default, comma-separated")


@cli.command(_define)
def main(options: argparse.Namespace) -> None:
    """Prints a row for every chip, size, dtype and tile."""
    import jax

    from cwcl_jax.planning.targets import NoCompiler

    # the chips are only described, so none is searched for
    jax.config.update("jax_platforms", "cpu")
    rows = []
    try:
        for chip in options.chips:
            for loss in options.losses:
                for n, d in options.sizes:
                    for dtype in options.dtypes:
                        for block in _blocks(options.tiles):
                            rows.append(measure(CHIPS[chip], loss, n, d, dtype, block))
                            print(markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    except NoCompiler as error:
        raise ConfigError(str(error)) from error
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    sys.exit(main())
