"""Test environment: four virtual CPU devices, float32 by default, rank promotion is an error."""

import contextlib
import ctypes
import gc
import os
import sys
import tempfile
from importlib.machinery import PathFinder
from pathlib import Path
from unittest import mock

from tests import xla_flags

# Before the backend starts. Several CPU devices in one process can dead-lock with fewer
# runtime threads than devices have work queued (README.md).
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.with_devices(4)}".strip()
    )
# Most of the suite's time is compilation of programs that several tests (and the processes that
# they start) share; a loss that is called outside of `jax.jit` is two hundred small ones. A folder
# of this session's own: nothing stale is ever read.
_CACHE = tempfile.TemporaryDirectory(prefix="cwcl_jax_compilation_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Half of the time of a compilation goes into optimising. JAX's own tests do so too.
if not xla_flags.OPTIMIZED:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis  # noqa: E402
import jax  # noqa: E402  after the variables above
import pytest  # noqa: E402

import tests.typecheck  # noqa: E402, F401  named in pyproject.toml, where it must be loaded already

jax.config.update("jax_numpy_rank_promotion", "raise")


class _Unchecked:
    """Imports what draws scenes and sentences without the type checker.

    Its small functions are called 100,000 times in a toy run; checking them was more than half of
    all calls there.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(("cwcl_jax.data.draws", "cwcl_jax.synthetic.")):
            return PathFinder.find_spec(name, path, target)
        return None


sys.meta_path.insert(0, _Unchecked)  # before jaxtyping's, which is there already
# The same examples every time, however slow the machine: what fails in one run fails in the next.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _no_curves():
    """Leaves the curves of runs undrawn, an eighth of a toy run; those that modules share draw."""
    run = sys.modules.get("cwcl_jax.training.run")
    with mock.patch.object(run, "plot_losses") if run else contextlib.nullcontext():
        yield


# Bytes of a process from which compiled programs are dropped, and those between two such cleanings.
_MUCH, _MORE = 2.0e9, 0.4e9
_limit = {"bytes": _MUCH}


def _resident_bytes() -> int:
    """Returns the memory of this process, 0 where the system does not tell it."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Drops the programs of a worker that has grown: a suite compiles thousands."""
    yield
    if _resident_bytes() > _limit["bytes"]:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _limit["bytes"] = max(_MUCH, _resident_bytes() + _MORE)
