"""The watchdog ends what stands still, and nothing else."""

import tempfile
import threading
import types

import pytest

from cwcl_jax.cli import WATCHDOG, exit_code
from cwcl_jax.progress import beat
from cwcl_jax.training import watchdog as module
from cwcl_jax.training.options import DistributedConfig
from cwcl_jax.training.watchdog import PHASES, Watchdog, unwatched


class Ended:
    """Stands in for `os._exit`."""

    def __init__(self):
        self.code = None
        self.event = threading.Event()

    def __call__(self, code):
        self.code = code
        self.event.set()


@pytest.fixture
def ended():
    return Ended()


def watched(limits, ended, output):
    return Watchdog(limits, outputs=[output], end=ended, tick=0.02)


def test_a_phase_over_its_limit_ends_the_process_and_names_itself(ended):
    with tempfile.TemporaryFile("w+") as output, watched({"step": 0.2}, ended, output) as dog:
        with dog.phase("step", "step 7, waiting for data"):
            assert ended.event.wait(300)
        output.seek(0)
        text = output.read()
    assert ended.code == WATCHDOG
    assert "in step (step 7, waiting for data); the limit is config.distributed.step" in text
    # The stacks of all threads, this one's among them.
    assert "test_a_phase_over_its_limit" in text
    assert "most recent call first" in text


def test_what_goes_wrong_once_the_end_has_begun_is_held(ended):
    with tempfile.TemporaryFile("w+") as output, watched({"step": 0.2}, ended, output) as dog:
        dog.hold()  # nothing has happened yet
        with dog.phase("step"):
            assert ended.event.wait(300)
        held = threading.Thread(target=dog.hold, daemon=True)
        held.start()
        held.join(0.2)
        assert held.is_alive()


@pytest.fixture
def clock(monkeypatch):
    """Time as the test has it: a starved machine may take a second for any line."""
    now = [0.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def set_to(seconds):
        now[0] = seconds
        return seconds

    return set_to


def test_progress_and_phases_without_limit_keep_it_alive(clock):
    dog = Watchdog({"step": 0.5})
    with dog.phase("step"):
        for number in range(1, 20):
            assert not dog._overdue(clock(0.4 * number))
            dog.beat()
        with dog.phase("evaluation"):  # no limit
            assert not dog._overdue(clock(10.0))
        # Back in the outer phase, whose time starts anew.
        assert not dog._overdue(clock(10.4))
        assert dog._overdue(clock(10.6))
    assert not dog._overdue(clock(20.0))  # outside of all phases


def test_compilation_has_a_limit_of_its_own(clock):
    dog = Watchdog({"first_step": 60.0, "step": 0.1})
    with dog.phase("step"), dog.phase("first_step"):
        assert not dog._overdue(clock(59.0))
        assert dog._overdue(clock(61.0))


def test_the_thread_stays_while_there_is_progress(ended):
    with tempfile.TemporaryFile("w+") as output, watched({"step": 60.0}, ended, output) as dog:
        with dog.phase("step"):
            assert not ended.event.wait(0.2)
        assert not ended.event.wait(0.1)
    assert ended.code is None


def test_time_in_which_the_process_was_frozen_does_not_count(clock):
    dog = Watchdog({"step": 10.0})
    with dog.phase("step"):
        assert dog._overdue(clock(100.0))
        dog._forgive(95.0)
        assert not dog._overdue(clock(100.0))
        dog._forgive(0.3)  # a busy machine is no excuse
        assert dog._overdue(clock(106.0))


def test_no_limits_no_thread():
    with unwatched() as dog, dog.phase("step"):
        assert dog._thread is None


def test_every_phase_has_a_setting_and_unknown_phases_are_errors():
    config = DistributedConfig()
    assert all(getattr(config, f"{phase}_timeout") > 0 for phase in PHASES)
    with pytest.raises(ValueError, match="phase 'stepp' is not one of startup, first_step"):
        unwatched().phase("stepp").__enter__()
    with pytest.raises(ValueError, match=r"step_timeout=-1\.0 must not be negative"):
        DistributedConfig(step_timeout=-1.0)


def test_a_passed_deadline_has_the_watchdogs_exit_code():
    assert exit_code(TimeoutError("barrier")) == WATCHDOG


def test_progress_far_below_is_heard_as_long_as_the_watchdog_runs(ended):
    """As of tars that are indexed: their module knows of no watchdog."""
    dog = unwatched()
    with dog, dog.phase("startup"):
        before = dog._phases[-1].since
        beat()
        assert dog._phases[-1].since > before
    beat()  # nobody listens
