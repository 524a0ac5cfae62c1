"""Checkpoints: which are kept, and clear words for those that cannot be restored."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import re
import shutil
import time
from types import CoroutineType

import jax
import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.training import checkpoint as checkpoint_module
from cwcl_jax.training import sharding
from cwcl_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from cwcl_jax.training.options import CheckpointConfig
from cwcl_jax.training.state import initialise, make_blueprint
from tests.training.toy import toy_config


@functools.cache
def blueprint(**changes):
    config = toy_config(**changes)
    return make_blueprint(config, sharding.make_mesh(config.mesh))


@pytest.fixture(scope="module")
def state():
    return initialise(blueprint())[0]


@pytest.fixture(scope="module")
def two_saved(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state, {"position": step})
    return folder


@pytest.fixture
def saved(two_saved, tmp_path):
    """A copy of two checkpoints, to be spoilt."""
    return shutil.copytree(two_saved, tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 2}, [5, 6]),
        ({"keep": 0}, [1, 2, 3, 4, 5, 6]),
        ({"keep": 1, "keep_every": 2}, [2, 4, 6]),
        ({"keep": 2, "keep_every": 3}, [3, 5, 6]),
    ],
)
def test_the_latest_and_the_milestones_are_kept(tmp_path, state, options, expected):
    with Checkpoints(tmp_path, CheckpointConfig(**options)) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, state, {"position": step})
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.steps == expected


def test_the_best_step_is_kept_beside_the_latest_and_told_by_the_newest_whole_one(tmp_path, state):
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        for step, best in enumerate((1, 2, 2, 2, 5, 5), 1):
            checkpoints.keep(best)
            checkpoints.save(step, state, {"position": step}, {"name": "loss:min", "step": best})
    (tmp_path / "6" / "_CHECKPOINT_METADATA").write_bytes(b"")
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.steps == [5, 6]
        assert checkpoints.best() == {"name": "loss:min", "step": 5}
        assert checkpoints.best(6) is None


def test_what_was_saved_is_restored(saved, state):
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        restored, data_state = checkpoints.restore(4, blueprint().abstract_state())
    assert data_state == {"position": 4}
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def spoil(saved, pattern):
    """Cuts off files of the last checkpoint after ten bytes, as a full disk does."""
    files = [path for path in (saved / "4").glob(pattern) if path.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:10])


def coroutines_of_orbax():
    """The unfinished ones, but for those that can be collected now."""
    gc.collect()
    return [
        coroutine
        for coroutine in gc.get_objects()
        if type(coroutine) is CoroutineType  # isinstance would ask objects of other libraries
        and "orbax" in coroutine.cr_code.co_filename
        and inspect.getcoroutinestate(coroutine) != inspect.CORO_CLOSED
    ]


def unfinished_coroutines():
    return {id(coroutine) for coroutine in coroutines_of_orbax()}


def await_coroutines(before):
    """Waits until only the coroutines of `before` are unfinished, and closes those that never end.

    Called where their warnings are expected. Otherwise they come at the end of the session.
    """
    deadline = time.monotonic() + 20  # reads under way hold others back
    while unfinished_coroutines() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    for coroutine in coroutines_of_orbax():
        if id(coroutine) not in before:
            with contextlib.suppress(RuntimeError, ValueError):  # it runs in another thread
                coroutine.close()


# orbax leaves work of its own undone when it fails.
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "pattern", ["params/ocdbt.process_0/d/*", "params/_METADATA", "_CHECKPOINT_METADATA"]
)
def test_a_damaged_checkpoint_is_named_with_the_one_before(saved, pattern):
    spoil(saved, pattern)
    before = unfinished_coroutines()
    message = rf"{re.escape(str(saved))}/4 is damaged .*--step=2"
    target = blueprint().abstract_state()
    told = []
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        with pytest.raises(DamagedCheckpointError, match=message):
            checkpoints.restore(4, target)
        state, data_state = checkpoints.restore_newest(target, timeout=10, warn=told.append)
        assert checkpoints.steps == [2]
    assert data_state == {"position": 2}
    assert len(told) == 1
    assert re.search(message, told[0])
    assert sorted(path.name for path in (saved.parent / "damaged").iterdir()) == ["4"]
    await_coroutines(before)
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        checkpoints.save(4, state, {"position": 4})
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(4, target)[1] == {"position": 4}


def changed_at_random(folder, rng):
    """Flips a bit of a random file, or zeroes 512 bytes of it."""
    path = rng.choice([path for path in folder.rglob("*") if path.is_file()])
    content = bytearray(path.read_bytes())
    place = rng.integers(len(content))
    if rng.random() < 0.5:
        content[place] ^= 1 << rng.integers(8)
    else:
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("count", [8, pytest.param(120, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_restored_in_silence(two_saved, state, tmp_path, count):
    target = blueprint().abstract_state()
    rng = np.random.default_rng(count)
    before = unfinished_coroutines()
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(two_saved / "4", folder / "4")
        changed_at_random(folder, rng)
        with Checkpoints(folder, CheckpointConfig(), read_only=True) as checkpoints:
            try:
                restored, data_state = checkpoints.restore(4, target)
            except DamagedCheckpointError:
                continue
        assert data_state == {"position": 4}
        jax.tree.map(np.testing.assert_array_equal, restored, state)
    await_coroutines(before)


def test_a_checkpoint_without_digests_is_restored(tmp_path, state, monkeypatch):
    """Those of earlier versions."""
    monkeypatch.setattr(checkpoint_module, "_sealed", lambda metadata: {"data": metadata["data"]})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(4, state, {"position": 4})
        checkpoints.wait()
        restored, data_state = checkpoints.restore(4, blueprint().abstract_state())
    assert data_state == {"position": 4}
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_whole_checkpoint_is_told_with_the_way_out(saved):
    for step in ("2", "4"):
        shutil.rmtree(saved / step / "params")
    with (
        Checkpoints(saved, CheckpointConfig()) as checkpoints,
        pytest.raises(DamagedCheckpointError, match=r"no checkpoint in .* new --workdir"),
    ):
        checkpoints.restore_newest(blueprint().abstract_state(), timeout=10, warn=print)
    assert (saved / "4").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.name": "muon"}, r"rest/opt_state/\S+ is .* and \d+ more"),
        ({"towers.image.tune": "all"}, r"params/towers/image/\S+ is missing there and \("),
        (
            {"towers.text.overrides.width": 64},
            r"params/towers/text/\S+ is \(32,\) there and \(64,\)",
        ),
    ],
)
def test_settings_that_change_leaves_are_told_with_the_way_out(saved, changes, message):
    with (
        Checkpoints(saved, CheckpointConfig()) as checkpoints,
        pytest.raises(ConfigError, match=rf"{message}.*config\.towers\.<modality>\.weights"),
    ):
        checkpoints.restore(4, blueprint(**changes).abstract_state())


def test_learning_rate_factors_may_change(saved):
    changes = {"optimizer.layer_decay": 0.5, "optimizer.multipliers": ("logit_scale=10",)}
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        checkpoints.restore(4, blueprint(**changes).abstract_state())


def test_a_workdir_that_is_moved_keeps_what_was_saved(saved, state):
    """And nothing is written where it was: a run in two folders is in none."""
    moved = saved.with_name("moved")
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        saved.rename(moved)
        with pytest.raises(FileNotFoundError, match=r"moved or removed.*that --workdir continues"):
            checkpoints.save(6, state, {"position": 6})
    assert not saved.exists()
    with Checkpoints(moved, CheckpointConfig()) as checkpoints:
        _, position = checkpoints.restore(4, blueprint().abstract_state())
    assert position == {"position": 4}
