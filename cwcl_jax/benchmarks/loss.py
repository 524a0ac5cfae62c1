"""Measures time and memory of the losses with gradient: python -m cwcl_jax.benchmarks.loss.

Every measurement runs in a fresh process, in which calls of the loss alternate with calls of a
plain square matrix product. The floor is the time of the loss's matrix flops (8 N^2 d, or 6 N^2 d
with u constant) at the rate of that product. `products` are the flops of all products in a JAX
form's program, divided by 8 N^2 d (contrastive's). `over_contrastive` is the time divided by that
of "fused contrastive" of the same size, if that was measured before. Wall times are the fastest of
all rounds. CPU times (all threads) are reliable on a shared machine too, except for forms that
wait. Memory is the peak above that before the first call; on a GPU it is the device's own count.
Writes loss.md, loss.json and loss.png, the memory of each form against the size of the batch.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cwcl_jax import cli
from cwcl_jax.benchmarks import harness
from cwcl_jax.benchmarks.harness import Row, interleaved, peak_resident_bytes, run_fresh
from cwcl_jax.losses.presets import PRESETS

FORMS = (
    "fused cwcl",
    "fused cwcl, u constant",
    "fused contrastive",
    "gathered cwcl",
    "ring cwcl",
    "dense jax cwcl",
    "dense torch cwcl",
    "dense torch contrastive",
)
# Every preset, tiled on one device, by `--forms=presets` (contrastive first) or by their names.
PRESET_FORMS = (
    "fused contrastive",
    *(f"fused {name}" for name in PRESETS if name != "contrastive"),
)
# Dense forms keep about this many N x N float32 arrays; forms that need too much are left out.
_DENSE_ARRAYS = 7
_SHARDED_DEVICES = 2
COLUMNS = (
    "form", "n", "d", "dtype", "seconds", "cpu_seconds", "products", "over_contrastive",
    "cpu_over_contrastive", "matmul_gflops", "of_matmul_rate", "of_matmul_rate_cpu", "extra_mb",
    "failed",
)  # fmt: skip


def made_embeds(n: int, d: int):
    """Returns two arrays of rows of unit norm."""
    import numpy as np

    rng = np.random.default_rng(0)
    both = [rng.standard_normal((n, d), np.float32) for _ in "uv"]
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in both]


def jax_call(form: str, u, v, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns the loss's value and gradient, and a square product of the same dtype, as calls."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from cwcl_jax.losses import LossConfig, make_loss
    from cwcl_jax.planning.work import count_work

    kind, name = form.split(", ")[0].rsplit(" ", 1)
    mesh = None
    u, v = (jnp.asarray(x, dtype) for x in (u, v))
    if kind in ("gathered", "ring"):
        mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
        u, v = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (u, v))
    config = LossConfig(name=name, form=kind.removesuffix(" jax"), diagnostics=False)
    loss_fn = make_loss(config, mesh=mesh)
    wanted = (1, 2) if "constant" in form else (0, 1, 2)
    # Ten pairs of each label; features as wide as the embeddings.
    labels = jnp.arange(len(u), dtype=jnp.int32) // 10

    def loss(u, v, scale):
        p, q = jax.lax.stop_gradient((u, v))
        return loss_fn(u, v, p, scale, -10.0, labels=labels, q=q)[0]

    scale = jnp.asarray(2.66, jnp.float32)
    gradient = jax.value_and_grad(loss, argnums=wanted)
    flops = count_work(gradient, u, v, scale, devices=mesh.size if mesh else 1).total_flops
    # Compiled ahead, so that the compiler's own memory is not counted.
    run = jax.jit(gradient).lower(u, v, scale).compile()
    # Random numbers, because a matrix of ones would draw less power than real data.
    square = jax.random.normal(jax.random.key(0), (4096, 4096), dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, precision="highest"))
    return (
        _Counted(lambda: jax.block_until_ready(run(u, v, scale)), flops),
        lambda: jax.block_until_ready(product(square)),
    )


@dataclasses.dataclass(frozen=True)
class _Counted:
    """A call, with the number of flops in its program's products."""

    call: Callable[[], Any]
    flops: float

    def __call__(self) -> Any:
        return self.call()


def torch_call(form: str, u, v, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns the same two calls in PyTorch."""
    from cwcl_jax.losses import torch_reference

    return torch_reference.benchmark_calls(form.rsplit(" ", 1)[1], u, v, dtype)


def timed(call: Callable[[], Any]) -> Callable[[], tuple[float, float]]:
    """Returns a function that returns the wall and CPU seconds of a call."""

    def run() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - wall, time.process_time() - cpu

    return run


def measure(job: Row) -> Row:
    """Returns the measurement of one form at one size, run in this process."""
    form, n, d = job["form"], job["n"], job["d"]
    if form.startswith(("gathered", "ring")):
        os.environ.setdefault("PJRT_NPROC", "32")
        flag = f" --xla_force_host_platform_device_count={_SHARDED_DEVICES}"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
    u, v = made_embeds(n, d)
    call = torch_call if "torch" in form else jax_call
    run, product = call(form, u, v, job["dtype"])
    products = getattr(run, "flops", None)
    product()
    before = peak_resident_bytes()
    run()
    extra = peak_resident_bytes() - before
    cases = {"product": timed(product), "loss": timed(run)}
    times = interleaved(cases, rounds=2, seconds=job["seconds"])
    (square_wall, square_cpu), (wall, cpu) = (
        tuple(min(x) for x in zip(*times[name], strict=True)) for name in cases
    )
    flops = (6 if "constant" in form else 8) * n * n * d
    share = flops / (2 * 4096**3)
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        **({} if products is None else {"products": products / (8 * n * n * d)}),
        "matmul_gflops": 2 * 4096**3 / square_wall / 1e9,
        "of_matmul_rate": share * square_wall / wall,
        "of_matmul_rate_cpu": share * square_cpu / cpu,
        "extra_mb": device_peak_mb(form) or extra / 2**20,
    }


def device_peak_mb(form: str) -> float:
    """Returns an accelerator's peak memory in MB by the form's own library; 0 on a CPU."""
    if "torch" in form:
        from cwcl_jax.losses import torch_reference

        return torch_reference.device_peak_bytes() / 2**20
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", 0) / 2**20


def _define(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    default = "1024x512,4096x512,16384x768,65536x512"
    add("--sizes", type=cli.sizes, default=default, help="N x d, comma-separated")
    known = cli.names(tuple(dict.fromkeys((*FORMS, *PRESET_FORMS))), separator=";")

    def forms(text: str) -> list[str]:
        return list(PRESET_FORMS) if text == "presets" else known(text)

    add(
        "--forms",
        type=forms,
        default=list(FORMS),
        help="names separated by ;, or presets for all presets",
    )
    dtypes = cli.names(["float32", "bfloat16", "float16"])
    add(
        "--dtypes",
        type=dtypes,
        default="float32",
        help="dtypes; bfloat16 and float16 are meant for GPUs",
    )
    add("--seconds", type=float, default=10.0, help="minimum seconds per measurement")
    add(
        "--dense_gb",
        type=float,
        default=8.0,
        help="limit in GB above which dense forms are left out",
    )
    harness.define(parser, "loss")
    harness.define_job(parser)


def _compare(rows: list[Row]) -> None:
    """Adds the last row's times relative to contrastive's of the same size and dtype."""
    row = rows[-1]
    same = ("n", "d", "dtype")
    for other in rows:
        plain = other["form"] == "fused contrastive" and "seconds" in other
        if plain and "seconds" in row and all(other[key] == row[key] for key in same):
            for name, key in (("", "seconds"), ("cpu_", "cpu_seconds")):
                row[f"{name}over_contrastive"] = row[key] / other[key]


def plot_memory(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG: extra memory over pairs, a line for each form of the first width and dtype.

    0 MB is a call that stays below the peak before it. Without any measurement there is no PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    d, dtype = rows[0]["d"], rows[0]["dtype"]
    measured = [r for r in rows if (r["d"], r["dtype"]) == (d, dtype) and "extra_mb" in r]
    if not measured:
        return
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for form in dict.fromkeys(row["form"] for row in measured):
        points = [(r["n"], r["extra_mb"]) for r in measured if r["form"] == form]
        axis.plot(*zip(*points, strict=True), marker="o", label=form)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({row["n"] for row in measured}), minor=False)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:,.0f}")
    axis.set(xlabel="pairs in the batch", ylabel="extra memory, MB")
    axis.set_title(f"Value and gradients, {dtype}, embeddings of {d}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, format="png", dpi=100)


@cli.command(_define)
def main(options: argparse.Namespace) -> int:
    """Measures all forms and sizes; fails if a measurement fails."""
    if options.job:
        print(json.dumps(measure(options.job)))
        return cli.DONE
    rows = []
    for (n, d), dtype, form in itertools.product(options.sizes, options.dtypes, options.forms):
        job = {"form": form, "n": n, "d": d, "dtype": dtype, "seconds": options.seconds}
        gb = _DENSE_ARRAYS * n * n * 4 / 1e9
        if "dense" in form and gb > options.dense_gb:
            rows.append(job | {"failed": f"left out: needs about {gb:.0f} GB"})
        else:
            rows.append(run_fresh("cwcl_jax.benchmarks.loss", job, options.timeout))
        _compare(rows)
        print(harness.markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    harness.report(options.output, "loss", {"losses": rows}, {"losses": COLUMNS})
    plot_memory(rows, options.output / "loss.png")
    return harness.code_of(rows)


if __name__ == "__main__":
    sys.exit(main())
