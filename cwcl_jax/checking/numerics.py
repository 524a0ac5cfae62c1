"""Checks of the numerics: products, the loss, a token table's gradient, and attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cwcl_jax.checking.findings import FAIL, LOOK, PASS, Finding, Machine, seconds_of
from cwcl_jax.losses import LossConfig, make_loss
from cwcl_jax.models.attention import attend, choice
from cwcl_jax.models.transformer import Execution, embedding
from cwcl_jax.precision import PRECISIONS, product

# Largest allowed relative errors of each precision: of a product, and of the loss's gradients at
# 1/tau = 50. They are about three times those that BUILD_NOTES.md, "Accelerators", found by
# emulation.
_PRODUCT = {"highest": 1e-6, "high": 3e-5, "default": 8e-3, "bfloat16": 8e-3}
_LOSS = {"highest": 1e-5, "high": 5e-5, "default": 1e-2, "bfloat16": 1e-2}


def relative(found: object, exact: object) -> float:
    """Returns the norm of the difference relative to the norm of the exact array, in float64."""
    a, b = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))


def products(machine: Machine) -> Iterator[Finding]:
    """Yields the relative errors of a float32 product by precision."""
    x = np.random.default_rng(0).standard_normal((256 if machine.tiny else 1024,) * 2, np.float32)
    exact = x.astype(np.float64) @ x.astype(np.float64)
    dimensions = (((1,), (0,)), ((), ()))
    errors = {
        name: relative(jax.jit(lambda a, n=name: product(a, a, dimensions, n, a.dtype))(x), exact)
        for name in _PRODUCT
    }
    yield _judged("float32 products", errors, _PRODUCT)


def _judged(check: str, errors: dict[str, float], limits: dict[str, float]) -> Finding:
    worse = [name for name, error in errors.items() if not error <= limits[name]]
    said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not worse:
        return Finding(check, PASS, f"relative errors {said}", values=errors)
    advice = f"{', '.join(worse)}: more than {', '.join(f'{limits[n]:.0e}' for n in worse)}; "
    advice += "XLA_FLAGS or JAX_DEFAULT_MATMUL_PRECISION may lower it, else report it"
    return Finding(check, FAIL, f"relative errors {said}", advice, errors)


def pairs(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows u and v of unit norm, as close to each other as those of a trained model."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((n, d), np.float32)
    v = u + rng.standard_normal((n, d), np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))  # type: ignore


def exact_cwcl(u: np.ndarray, v: np.ndarray, scale: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns CWCL by its equations in float64: value, and gradients of u and v; p = u."""
    u, v = u.astype(np.float64), v.astype(np.float64)
    logits, weights = scale * u @ v.T, (u @ u.T + 1) / 2
    targets = weights / weights.sum(1, keepdims=True)
    value, gradient = 0.0, -targets - np.eye(len(u))
    for axis, wanted in ((1, targets), (0, np.eye(len(u)))):
        top = logits.max(axis, keepdims=True)
        sums = np.exp(logits - top).sum(axis, keepdims=True)
        logarithms = logits - top - np.log(sums)
        value -= (wanted * logarithms).sum() / len(u)
        gradient += np.exp(logarithms)
    gradient *= scale / len(u)
    return value, gradient @ v, gradient.T @ u


def loss(machine: Machine) -> Iterator[Finding]:
    """Yields the error of the tiled loss and its gradients in every precision, against float64."""
    scale = 50.0
    u, v = pairs(*((256, 32) if machine.tiny else (2048, 512)))
    value, *gradients = exact_cwcl(u, v, scale)

    def error(precision: str) -> float:
        config = LossConfig(form="fused", precision=precision, diagnostics=False)
        function = make_loss(config)

        def total(u: jax.Array, v: jax.Array) -> jax.Array:
            return function(u, v, jax.lax.stop_gradient(u), jnp.log(jnp.float32(scale)))[0]

        got, found = jax.jit(jax.value_and_grad(total, (0, 1)))(u, v)
        errors = [relative(a, b) for a, b in zip(found, gradients, strict=True)]
        return max(abs(float(got) - value) / value, *errors)

    precisions = ("highest", "bfloat16") if machine.tiny else (*PRECISIONS, "bfloat16")
    yield _judged("loss against float64", {name: error(name) for name in precisions}, _LOSS)


def token_table(machine: Machine) -> Iterator[Finding]:
    """Yields the error of a token table's bfloat16 gradient, where narrow sums would stall."""
    rows, width, size = (256, 8, 200) if machine.tiny else (4096, 256, 30_522)
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.3, (rows, 32)), size - 1).astype(np.int32)
    cotangent = (0.3 + rng.standard_normal((rows, 32, width))).astype(jnp.bfloat16)
    table = embedding(size, width, Execution(dtype=jnp.bfloat16), nnx.Rngs(0))
    definition, state = nnx.split(table)

    def total(state: Any) -> jax.Array:
        narrow = nnx.merge(definition, state)(jnp.asarray(tokens)).astype(jnp.bfloat16)
        return jnp.vdot(narrow.astype(jnp.float32), jnp.asarray(cotangent, jnp.float32))

    found = jax.tree.leaves(jax.jit(jax.grad(total))(state))[0]
    exact = np.zeros((size, width))
    np.add.at(exact, tokens.reshape(-1), cotangent.astype(np.float64).reshape(-1, width))
    yield _judged(f"token table, {rows:,} rows", {"bfloat16": relative(found, exact)},
                  {"bfloat16": 1e-4})  # fmt: skip


def attention(machine: Machine) -> Iterator[Finding]:
    """Yields, by case, the attention that "auto" selects, its agreement with XLA's, and its speed.

    XLA's attention in float32 is the reference.
    """
    cases = {"image 197": (197, 12, 64, False), "text 77, masked": (77, 12, 64, True)}
    batch = 64
    if machine.tiny:
        cases, batch = {"text 15, masked": (15, 2, 16, True)}, 2
    for name, (tokens, heads, size, masked) in cases.items():
        chosen = choice((tokens, heads, size), jnp.bfloat16, masked, False)
        keys = jax.random.split(jax.random.key(0), 4)
        shape = (batch, tokens, heads, size)
        q, k, v, g = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        lengths = jnp.maximum(tokens - 3 * jnp.arange(batch), 3)
        mask = jnp.arange(tokens)[None] < lengths[:, None] if masked else None

        jitted = jax.jit(partial(_attention_gradients, mask), static_argnums=0)
        with jax.default_matmul_precision("highest"):
            exact = jitted("xla", *(x.astype(jnp.float32) for x in (q, k, v, g)))
        errors = [relative(a, b) for a, b in zip(jitted(chosen, q, k, v, g), exact, strict=True)]
        times = {
            form: 1e3 * seconds_of(partial(jitted, form, q, k, v, g))
            for form in dict.fromkeys(("xla", chosen))
        }
        said = f"{chosen}; gradients differ by {max(errors):.1e}; " + ", ".join(
            f"{form} {ms:.3g} ms" for form, ms in times.items()
        )
        verdict, advice = PASS, ""
        if not max(errors) < 3e-2:
            verdict, advice = FAIL, "set config.towers.<name>.attention='xla' and report it"
        elif machine.is_gpu and chosen != "cudnn":
            verdict, advice = LOOK, "the warning above says why cuDNN's kernel is not used"
        elif times[chosen] > 1.1 * times["xla"]:
            verdict, advice = LOOK, "config.towers.<name>.attention='xla' is faster here"
        yield Finding(f"attention, {name}", verdict, said, advice, times | {"error": max(errors)})


def _attention_gradients(
    mask: jax.Array | None, implementation: str, q: jax.Array, k: jax.Array, v: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Returns the gradients of q, k and v, for the cotangent g at real tokens."""
    real = 1.0 if mask is None else mask[:, :, None, None]

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        made = attend(q, k, v, mask, causal=False, implementation=implementation)
        return jnp.sum(made.astype(jnp.float32) * g.astype(jnp.float32) * real)

    return jax.grad(total, (0, 1, 2))(q, k, v)
