"""The tests' own environment: what processes that run beside each other share."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest


def compile_anew():
    def half_written_by_another_process(x):
        return jnp.sin(x) @ jnp.cos(x).T + 3.25

    jax.jit(half_written_by_another_process)(jnp.ones((7, 7)))


@pytest.fixture
def keep_everything():
    """Programs that compile in no time are kept too."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_half_an_entry_of_the_compilation_cache_is_no_error(keep_everything):
    compile_anew()
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    (entry,) = folder.glob("jit_half_written_by_another_process-*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    compile_anew()
    entry.unlink()
