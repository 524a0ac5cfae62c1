"""Options of XLA on CPUs reach the compiler, and are left out where there are none."""

import re

import jax
import jax.numpy as jnp
import pytest

from cwcl_jax import compiling


def test_products_are_xlas_own_and_sums_the_librarys():
    def both(x):
        return x @ x, jnp.sum(x, axis=0)

    options = compiling.options("cpu")
    assert options is not None  # jax of this project's lock has the option
    program = jax.jit(both, compiler_options=options).lower(jnp.ones((256, 256))).compile()
    entry = program.as_text().partition("ENTRY")[2]
    assert len(re.findall(r" dot\(", entry)) == 1
    assert "ynn" in entry  # the sum


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_other_platforms_have_none(platform):
    assert compiling.options(platform) is None


def test_a_compiler_without_the_option_gets_none(monkeypatch):
    monkeypatch.setattr(compiling, "_ONLY_SUMS", {"xla_cpu_no_such_option": "1"})
    compiling._known.cache_clear()
    try:
        assert compiling.options("cpu") is None
    finally:
        compiling._known.cache_clear()
