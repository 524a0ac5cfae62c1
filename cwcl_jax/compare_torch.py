"""Compares loss and gradients with PyTorch: python -m cwcl_jax.compare_torch [--output=DIR].

Every row is one form of the loss on one set of embeddings. The reference is PyTorch autograd on the
equations in float64 with the same (rounded) embeddings. `--embeds=FILE.npz` reads arrays u, v and,
optionally, p (u by default, which is reported) and logit_scale, the log of 1/tau, from your own
model. Writes compare_torch.md and .json, with the losses of the same small training run in both
frameworks. The exit code is 1 if a tolerance is exceeded. Needs `pip install cwcl_jax[torch]`.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# Before the backend starts: devices for the sharded forms on a CPU (launch/README.md, "Trouble").
os.environ.setdefault("PJRT_NPROC", "32")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    ).strip()

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from cwcl_jax import cli
from cwcl_jax.benchmarks.harness import Row, markdown
from cwcl_jax.config import ConfigError
from cwcl_jax.losses import LossConfig, make_loss

# Largest allowed errors: of the value (relative, or absolute below 1), and of each gradient
# (relative to its norm; near 0 relative to a share of its terms, see `errors`). For narrow dtypes
# only the gradients are rounded. Plain accelerator float32 products ("tf32") keep 10 bits, and the
# inverse temperature multiplies their rounding errors.
TOLERANCES = {
    "float64": (1e-12, 1e-11),
    "float32": (1e-5, 1e-5),
    "bfloat16": (1e-5, 1e-2),
    "float16": (1e-5, 3e-3),
    "tf32": (5e-2, 5e-2),
}
# Share of the norm of a gradient's terms: the smallest norm that its error is compared with.
_FLOOR = 0.1
# A larger stored value is not a log: 1/tau would be above 1,000 (CLIP's is at most 100).
_LARGEST_LOG = 7.0
FORMS = ("dense", "fused", "gathered", "ring")


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Returns rows divided by their norm."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def made_embeds(n: int, d: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns pairs as related as a trained model's, with p correlated among themselves."""
    rng = np.random.default_rng(seed)
    u = unit_rows(rng.normal(size=(n, d)) + 0.5 * rng.normal(size=(1, d)))
    return {"u": u, "v": unit_rows(u + rng.normal(size=(n, d)) / np.sqrt(d)), "p": u}


def read_embeds(path: str) -> dict[str, np.ndarray]:
    """Returns arrays u, v, p and, optionally, logit_scale of a user's file, rows normalised.

    Raises:
      ValueError: the file is not an .npz with such arrays.
    """
    with Path(path).open("rb") as stream:
        try:
            file: Any = np.load(stream)
        except (EOFError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{path} is not a .npz file: {error}") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"{path} is one array; save u and v with np.savez.")
        wanted = [name for name in ("u", "v", "p", "logit_scale") if name in file.files]
        missing = {"u", "v"} - set(wanted)
        if missing:
            raise ValueError(f"{path} has no array {sorted(missing)}; it has {sorted(file.files)}.")
        arrays = {name: np.asarray(file[name], np.float64) for name in wanted}
    scale = arrays.get("logit_scale", np.zeros(()))
    if scale.size != 1 or not np.isfinite(scale).all():
        raise ValueError(f"{path}: logit_scale must be one finite number, it is {scale}.")
    if scale.item() > _LARGEST_LOG:
        raise ValueError(
            f"{path}: logit_scale={scale.item():g} is not the log of 1/tau (4.6 for CLIP's 100) "
            "but seems to be 1/tau itself, as OpenCLIP's models return it; save np.log of it."
        )
    if "p" not in arrays:
        print(f"{path} has no p: the similarity weights come from u")
    arrays = {"p": arrays["u"]} | arrays
    u, v, p = (arrays[name] for name in ("u", "v", "p"))
    if u.ndim != 2 or v.shape != u.shape or p.ndim != 2 or len(p) != len(u):
        shapes = f"u {u.shape}, v {v.shape}, p {p.shape}"
        raise ValueError(f"{path}: u and v must be (n, d), p (n, k); they are {shapes}.")
    for name in ("u", "v", "p"):
        norms = np.linalg.norm(arrays[name], axis=1)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(bad):
            raise ValueError(f"{path}: row {bad[0]} of {name} is zero or not finite.")
        arrays[name] = unit_rows(arrays[name])
    return arrays


def rounded(arrays: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Returns the embeddings rounded to a dtype, as float64."""
    kind = jnp.dtype("float32" if dtype == "tf32" else dtype)
    return {k: np.asarray(arrays[k].astype(kind), np.float64) for k in ("u", "v", "p")}


def jax_gradients(name, form, dtype, arrays, logit_scale, devices) -> tuple[float, list]:
    """Returns the loss and gradients of one JAX form, as float64 numpy."""
    mesh = None
    if form in ("gathered", "ring"):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    precision = "default" if dtype == "tf32" else "highest"
    config = LossConfig(name=name, form=form, precision=precision, diagnostics=False)
    loss_fn = make_loss(config, mesh=mesh)
    kind = jnp.dtype("float32" if dtype == "tf32" else dtype)
    u, v, p = (jnp.asarray(arrays[k], kind) for k in ("u", "v", "p"))
    scale = jnp.asarray(logit_scale, jnp.promote_types(kind, jnp.float32))

    def loss(u, v, scale):
        return loss_fn(u, v, p, scale, -10.0)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(u, v, scale)
    return float(value), [np.asarray(g, np.float64) for g in gradients]


def compare(name, form, dtype, arrays, logit_scale, devices) -> Row:
    """Returns one row of the table."""
    from cwcl_jax.losses import torch_reference

    arrays = rounded(arrays, dtype)
    exact = torch_reference.value_and_gradients(
        name, arrays["u"], arrays["v"], arrays["p"], logit_scale, "float64"
    )
    if form == "pytorch":
        ours = torch_reference.value_and_gradients(
            name, arrays["u"], arrays["v"], arrays["p"], logit_scale, dtype
        )
    else:
        ours = jax_gradients(name, form, dtype, arrays, logit_scale, devices)
    used = devices if form in ("gathered", "ring") else 1
    return row_of(name, form, dtype, arrays, logit_scale, used) | errors(
        ours, exact, dtype, terms_of(arrays, logit_scale)
    )


def row_of(name, form, dtype, arrays, logit_scale, devices) -> Row:
    """Returns what a row compares."""
    return {
        "loss": name,
        "form": form,
        "dtype": dtype,
        "n": len(arrays["u"]),
        "d": arrays["u"].shape[1],
        "inverse_temperature": round(float(np.exp(logit_scale)), 4),
        "devices": devices,
    }


def terms_of(arrays: dict[str, np.ndarray], logit_scale: float) -> float:
    """Returns the norm of what u's gradient sums before it cancels: rows of 1/tau divided by n."""
    return float(np.exp(logit_scale)) / math.sqrt(len(arrays["u"]))


def errors(ours: tuple[float, list], exact: tuple[float, list], dtype: str, terms: float) -> Row:
    """Returns differences of value and gradients, and whether they are within the tolerance.

    Args:
      ours: value, and the gradients of u, v and logit_scale.
      exact: the same in float64.
      dtype: names the tolerance.
      terms: norm of what a gradient sums. If the pairs are already well separated, the terms cancel
          and only their rounding is left, in any framework. The error is then compared with a share
          of the terms.
    """
    value = abs(ours[0] - exact[0]) / max(1.0, abs(exact[0]))
    names = ("grad_u", "grad_v", "grad_logit_scale")
    relative = {
        name: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), _FLOOR * terms))
        for name, a, b in zip(names, ours[1], exact[1], strict=True)
    }
    kind = "float32" if dtype == "tf32" else dtype
    # The error in units of the dtype's spacing at each exact entry.
    ulps = [
        float(np.median(np.abs(a - b) / spacing(b, kind)))
        for a, b in zip(ours[1][:2], exact[1][:2], strict=True)
    ]
    limit = TOLERANCES[dtype]
    # The gradient of logit_scale is one number that may be near 0: absolute below 1.
    scale_error = abs(float(ours[1][2] - exact[1][2])) / max(1.0, abs(float(exact[1][2])))
    worst = max(relative["grad_u"], relative["grad_v"], scale_error)
    return {
        "value": ours[0],
        "value_error": value,
        **relative,
        "median_ulps": max(ulps),
        "passed": bool(value <= limit[0] and worst <= limit[1]),
    }


def spacing(x: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the distance of each number to the next one that the dtype can represent."""
    info = jnp.finfo(jnp.dtype(dtype))
    size = np.maximum(np.abs(x), float(info.tiny))
    return 2.0 ** np.floor(np.log2(size)) * float(info.eps)


def several_processes(name: str, arrays: dict[str, np.ndarray], logit_scale, world: int) -> Row:
    """Returns a row for PyTorch over gloo with an all-gather, against the JAX ring, in float32.

    Both use the same number of devices.
    """
    from cwcl_jax.losses import torch_reference

    arrays = {k: x.astype(np.float32) for k, x in rounded(arrays, "float32").items()}
    with tempfile.TemporaryDirectory() as folder:
        # A file as the meeting point, so that no port is needed.
        address, out = f"file://{folder}/meet", f"{folder}/out"
        given = arrays | {"logit_scale": np.float32(logit_scale)}
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(
                target=torch_reference.gathered_gradients,
                args=(rank, world, address, given, name, out),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
        codes = [process.exitcode for process in processes]
        if any(code != 0 for code in codes):  # None: the process hangs
            for process in processes:
                process.kill()
            raise RuntimeError(f"PyTorch processes ended with exit codes {codes}.")
        parts = [dict(np.load(f"{out}.{rank}.npz")) for rank in range(world)]
    theirs = [np.concatenate([part[k] for part in parts]).astype(np.float64) for k in "uv"]
    theirs.append(np.asarray(parts[0]["logit_scale"], np.float64))
    ours = jax_gradients(name, "ring", "float32", arrays, float(np.float32(logit_scale)), world)
    row = row_of(name, f"ring / gloo x {world}", "float32", arrays, logit_scale, world)
    exact = float(parts[0]["loss"]), theirs
    return row | errors(ours, exact, "float32", terms_of(arrays, logit_scale))


def train_in_jax(weights, batches, name, learning_rate, weight_decay) -> list[float]:
    """Returns the losses of `torch_reference.train_two_towers`, with optax and the tiled loss."""
    loss_fn = make_loss(LossConfig(name=name, form="fused", diagnostics=False))
    params = {k: jnp.asarray(x) for k, x in weights.items()}
    decayed = {k: x.ndim > 1 for k, x in params.items()}
    optimizer = optax.adamw(
        learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay, mask=decayed
    )
    state = optimizer.init(params)

    def loss(params, batch):
        hidden = jnp.tanh(batch["v"] @ params["hidden"] + params["bias"][None])
        v = hidden @ params["out"]
        v = v * jax.lax.rsqrt(jnp.maximum(jnp.square(v).sum(axis=1, keepdims=True), 1e-24))
        return loss_fn(batch["p"], v, batch["p"], params["logit_scale"], -10.0)[0]

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return losses


def training_curves(name: str, steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Returns the losses of one training in both frameworks: same weights and batches, AdamW."""
    from cwcl_jax.losses import torch_reference

    rng = np.random.default_rng(seed)
    n, d_in, width, d = 64, 24, 48, 16
    mixing = rng.normal(size=(d, d_in))

    def batch():
        p = unit_rows(rng.normal(size=(n, d)))
        v = p @ mixing + 0.1 * rng.normal(size=(n, d_in))
        return {"p": p.astype(np.float32), "v": v.astype(np.float32)}

    weights = {
        "hidden": rng.normal(size=(d_in, width)) / np.sqrt(d_in),
        "bias": np.zeros(width),
        "out": rng.normal(size=(width, d)) / np.sqrt(width),
        "logit_scale": np.log(1 / 0.07),
    }
    weights = {k: np.asarray(x, np.float32) for k, x in weights.items()}
    batches = [batch() for _ in range(steps)]
    settings = (name, 1e-3, 1e-4)
    return {
        "pytorch": torch_reference.train_two_towers(weights, batches, *settings),
        "jax": train_in_jax(weights, batches, *settings),
    }


def _define(parser: argparse.ArgumentParser) -> None:
    try:
        from cwcl_jax.losses import torch_reference
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}: pip install 'cwcl_jax[torch]'") from error
    on_gpu = jax.default_backend() == "gpu"
    dtypes = ["float64", "float32", "bfloat16", *(["tf32", "float16"] if on_gpu else [])]
    # cellclip takes profiles of several channels, which this table does not have.
    losses = [name for name in torch_reference.LOSSES if name != "cellclip"]
    add = parser.add_argument
    add("--embeds", type=_embeds, help=".npz with u, v and, optionally, p and logit_scale")
    where = "runs/compare_torch"
    add("--output", type=cli.folder, default=where, help="folder for the results")
    add("--losses", type=cli.names(losses), default=losses, help="names; default: all")
    forms = ["pytorch", *FORMS]
    add("--forms", type=cli.names(forms), default=forms, help="forms of the loss; default: all")
    about = "dtypes; default: those that the device supports"
    add("--dtypes", type=cli.names(list(TOLERANCES)), default=dtypes, help=about)
    add("--sizes", type=cli.sizes, help="N x d, comma-separated; default: 256x64")
    add("--inverse_temperatures", type=cli.positives, help="1 / tau; default: 14.3,100")
    devices = len(jax.devices())
    add("--devices", type=cli.at_least(1), default=devices, help="devices of the sharded forms")
    # A ring of one device is not a ring, so there is nothing to compare with it.
    processes = 2 if devices > 1 else 0
    add("--processes", type=cli.at_least(0), default=processes, help="PyTorch processes; 0: none")
    add("--steps", type=cli.at_least(0), default=100, help="training steps; 0: none")


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that contradict each other."""
    for option in ("devices", "processes"):
        if getattr(options, option) > len(jax.devices()):
            raise ConfigError(
                f"--{option}={getattr(options, option)}: there are {len(jax.devices())}"
            )
    if not (options.processes or combinations(options)):
        raise ConfigError("--forms=pytorch has no --dtypes=tf32: nothing is left to compare")
    if options.embeds and options.sizes:
        raise ConfigError("--sizes is for random embeds; --embeds has its own: leave one out")
    if options.embeds and "logit_scale" in options.embeds and options.inverse_temperatures:
        raise ConfigError("--inverse_temperatures and a logit_scale in --embeds: leave one out")
    if options.embeds and len(options.embeds["u"]) < multiple(options):
        raise ConfigError(
            f"--embeds has {len(options.embeds['u'])} rows, fewer than the {multiple(options)} "
            "that split evenly: lower --devices or --processes"
        )


def combinations(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Returns loss, form and dtype of the rows; PyTorch has no "tf32"."""
    found = itertools.product(options.losses, options.forms, options.dtypes)
    return [row for row in found if row[1:] != ("pytorch", "tf32")]


def multiple(options: argparse.Namespace) -> int:
    """Returns the number that divides the embeddings evenly over devices and processes."""
    sharded = any(form in ("gathered", "ring") for form in options.forms)
    return math.lcm(options.devices if sharded else 1, options.processes or 1)


def _embeds(path: str) -> dict[str, np.ndarray]:
    try:
        return read_embeds(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise argparse.ArgumentTypeError(f"{error}; --embeds={path}") from error


def all_rows(options: argparse.Namespace) -> list[Row]:
    """Returns the table of losses and gradients."""
    devices, even = options.devices, multiple(options)
    sizes = options.sizes or [(256, 64)]
    sets = [made_embeds(max(n - n % even, even), d) for n, d in sizes]
    scales = [float(np.log(number)) for number in options.inverse_temperatures or (14.3, 100)]
    if options.embeds:
        sets = [first_rows(options.embeds, even)]
        if "logit_scale" in options.embeds:
            scales = [options.embeds["logit_scale"].item()]
    rows = [
        compare(name, form, dtype, embeds, scale, devices)
        for embeds in sets
        for name, form, dtype in combinations(options)
        for scale in scales
    ]
    if options.processes:
        rows.append(several_processes(options.losses[0], sets[0], scales[0], options.processes))
    return rows


def first_rows(embeds: dict[str, np.ndarray], even: int) -> dict[str, np.ndarray]:
    """Returns as many rows as split evenly; prints how many were left out."""
    n = len(embeds["u"])
    if n % even:
        print(
            f"the first {n - n % even} of {n} rows are compared: a multiple of {even} splits evenly"
        )
    return {name: embeds[name][: n - n % even] for name in ("u", "v", "p")}


@cli.command(_define)
def main(options: argparse.Namespace) -> int:
    """Runs the comparison; fails if a tolerance is exceeded."""
    check(options)
    out = options.output
    out.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        rows = all_rows(options)
    report: Row = {"rows": rows, "tolerances": TOLERANCES}
    if options.steps:
        curves = {name: training_curves(name, options.steps) for name in ("cwcl", "contrastive")}
        report["training"] = curves
        for name, curve in curves.items():
            drift = float(np.max(np.abs(np.subtract(curve["jax"], curve["pytorch"]))))
            print(f"training, {name}: largest difference of losses {drift:.2e}")
    (out / "compare_torch.json").write_text(json.dumps(report, indent=1))
    text = markdown(rows, list(rows[0]))
    (out / "compare_torch.md").write_text(text)
    print(text)
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} rows within their tolerance; see {out}.")
    return cli.FAILED if failed else cli.DONE


if __name__ == "__main__":
    sys.exit(main())
