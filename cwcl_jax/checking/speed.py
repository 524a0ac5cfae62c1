"""Speed of the device: products, memory, the loss in its forms and tiles, collectives, input."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cwcl_jax.benchmarks.input import make_shards, rate_bare, rate_pipeline, reading
from cwcl_jax.checking.findings import LOOK, PASS, Finding, Machine, seconds_of, share_of
from cwcl_jax.checking.numerics import pairs
from cwcl_jax.data.pipeline import reader_threads
from cwcl_jax.losses import LossConfig, make_loss
from cwcl_jax.precision import PRECISIONS, product

# Shares of the data sheet's peak; below them something is wrong with clocks, power or drivers.
_LEAST_PRODUCT, _LEAST_MEMORY = 0.55, 0.6
_FIELDS = {"bfloat16": "half", "default": "single", "high": "high", "highest": "highest"}


def peaks(machine: Machine) -> Iterator[Finding]:
    """Yields TFLOP/s of products of normal random numbers, and GB/s between memory and chip."""
    n = 512 if machine.tiny else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.float32)
    dimensions = (((1,), (0,)), ((), ()))
    for name in ("bfloat16", *PRECISIONS):
        a = x.astype(jnp.bfloat16) if name == "bfloat16" else x
        call = jax.jit(lambda a, n=name: product(a, a, dimensions, n, jnp.float32))
        rate = 2 * n**3 / seconds_of(lambda c=call, a=a: c(a))
        peak = getattr(machine.chip, _FIELDS[name]) if machine.chip else None
        slow = peak is not None and rate < _LEAST_PRODUCT * peak
        yield Finding(
            f"products, {name}",
            LOOK if slow else PASS,
            f"{rate / 1e12:.3g} TFLOP/s{share_of(rate, peak)}",
            "check the clocks, the power limit and other users of the device" if slow else "",
            {"tflops": rate / 1e12},
        )
    size = 2**22 if machine.tiny else 2**30
    y = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda y: y + 1)
    rate = 2 * size / seconds_of(lambda: add(y))
    peak = machine.chip.bandwidth if machine.chip else None
    slow = peak is not None and rate < _LEAST_MEMORY * peak
    yield Finding(
        "memory",
        LOOK if slow else PASS,
        f"{rate / 1e9:.4g} GB/s{share_of(rate, peak)}",
        "check for other users of the device" if slow else "",
        {"gb_per_s": rate / 1e9},
    )


def losses(machine: Machine) -> Iterator[Finding]:
    """Yields the times of the loss: tiled, dense, PyTorch's if installed, and other tiles."""
    n, d = (512, 32) if machine.tiny else (16_384, 768)
    u, v = (jnp.asarray(x, jnp.bfloat16) for x in pairs(n, d))
    times: dict[str, float] = {}

    def measure(name: str, **options: Any) -> None:
        function = make_loss(LossConfig(diagnostics=False, **options))

        def total(u: jax.Array, v: jax.Array) -> jax.Array:
            return function(u, v, jax.lax.stop_gradient(u), jnp.float32(2.66))[0]

        call = jax.jit(jax.grad(total, (0, 1)))
        times[name] = seconds_of(lambda: call(u, v))

    for form in ("fused", "dense"):
        measure(form, form=form)
    with contextlib.suppress(ImportError):
        from cwcl_jax.losses.torch_reference import benchmark_calls

        call, _ = benchmark_calls("cwcl", *pairs(n, d), "bfloat16")
        times["torch"] = seconds_of(call)
    flops = 8 * n * n * d
    peak = machine.chip.half if machine.chip else None
    said = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in times.items())
    best = min(times, key=lambda name: times[name])
    slow = times["fused"] > 1.1 * times[best]
    yield Finding(
        f"loss, {n:,} pairs of {d}, bfloat16",
        LOOK if slow else PASS,
        f"{said}; tiled: {flops / times['fused'] / 1e12:.3g} TFLOP/s"
        + share_of(flops / times["fused"], peak),
        f"{best} is faster; loss.form='dense' where the memory allows" if slow else "",
        {f"{name}_ms": 1e3 * t for name, t in times.items()},
    )
    tiles = [(128, 128)] if machine.tiny else [(512, 4096), (1024, 4096), (1024, 16_384),
                                               (2048, 2048), (4096, 4096)]  # fmt: skip
    default = times["fused"]
    for rows, columns in tiles:
        if machine.left() > 15 or machine.tiny:
            measure(f"{rows}x{columns}", block_size=rows, block_columns=columns, form="fused")
    names = [name for name in times if "x" in name]
    best = min(names, key=lambda name: times[name], default="")
    slow = bool(best) and times[best] < 0.9 * default
    rows, _, columns = best.partition("x")
    yield Finding(
        "tiles of the loss",
        LOOK if slow else PASS,
        f"default {1e3 * default:.3g} ms, "
        + ", ".join(f"{name} {1e3 * times[name]:.3g} ms" for name in names),
        f"config.loss.block_size={rows}, block_columns={columns}" if slow else "",
        {name: 1e3 * times[name] for name in names},
    )


def collectives(machine: Machine) -> Iterator[Finding]:
    """Yields the bytes per second of an all-reduce over all devices of the job."""
    count = jax.device_count()
    if count == 1:
        return
    mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,))
    size = 2**16 if machine.tiny else 2**26
    split = NamedSharding(mesh, P("x"))
    make = jax.jit(lambda: jnp.ones((count, size), jnp.float32), out_shardings=split)
    add = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    x = make()
    seconds = seconds_of(lambda: add(x))
    rate = 2 * (count - 1) / count * 4 * size / seconds
    chip = machine.chip
    peak = chip.sends(count) if chip else None
    slow = peak is not None and rate < 0.4 * peak
    yield Finding(
        f"all-reduce over {count} devices",
        LOOK if slow else PASS,
        f"{rate / 1e9:.3g} GB/s sent by each{share_of(rate, peak)}",
        "NCCL_DEBUG=INFO shows which links it uses" if slow else "",
        {"gb_per_s": rate / 1e9},
    )


def reader(wanted: Callable[[], float]) -> Callable[[Machine], Iterator[Finding]]:
    """Returns a check of the images that this process's threads decode per second.

    `wanted()` is the rate that the step needs.
    """

    def check(machine: Machine) -> Iterator[Finding]:
        seconds, batch = (0.2, 16) if machine.tiny else (1.5, 128)
        most = reader_threads(0)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            images = make_shards(folder, shards=1, per_shard=40, distinct=20)
            line = f"tars:{folder}/00000.tar"
            rates = {}
            for threads in sorted({1, max(most // 4, 1), most}):
                bare = rate_bare(images, seconds, threads)
                ready = rate_pipeline(reading(line, threads), seconds, batch)
                rates[threads] = (bare.per_second, ready.per_second, ready.cpu_ms)
        best = max(ready for _, ready, _ in rates.values())
        slow = wanted() > best
        said = ", ".join(f"{t} threads {r:,.0f}" for t, (_, r, _) in rates.items())
        yield Finding(
            "images/s of this process",
            LOOK if slow else PASS,
            f"{said}; {rates[most][2]:.2g} core-ms an image"
            + (f"; the step takes {wanted():,.0f}" if wanted() else ""),
            "one process for each device and more cores for each (launch/README.md), or "
            "data.keep_locked_features" if slow else "",
            {str(t): list(r) for t, r in rates.items()},
        )  # fmt: skip

    return check
