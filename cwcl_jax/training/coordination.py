"""Communication between processes through jax's coordination service, without any device.

All functions here wait with a timeout and name the processes that did not arrive. A collective on
devices would wait forever without a message.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax

# The service's client has no public name; only this module uses it.
from jax._src import distributed as _jax_distributed

_uses: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def hosts_service() -> bool:
    """Returns whether this process runs the service; jax aborts processes when the service ends."""
    return _jax_distributed.global_state.service is not None


def part() -> None:
    """Leaves the service at the same time as all other processes, so that none is aborted."""
    service = client()
    if service is not None:
        service.shutdown()


class MissingProcessesError(TimeoutError):
    """Some processes did not reach a barrier in time; the message names them."""


def client() -> Any:
    """Returns the coordination service's client; None in a job of one process."""
    return _jax_distributed.global_state.client if jax.distributed.is_initialized() else None


def barrier(name: str, timeout: float) -> None:
    """Waits for all processes, which must call it with the same names in the same order.

    Args:
      timeout: seconds.

    Raises:
      MissingProcessesError: a process did not arrive.
    """
    gather(name, "", timeout)


def gather(name: str, value: str, timeout: float) -> list[str]:
    """Returns the values of all processes, by process number; a barrier.

    Raises:
      MissingProcessesError: a process did not arrive.
    """
    service = client()
    if service is None:
        return [value]
    count = jax.process_count()
    key = f"cwcl_jax/{name}/{next(_uses[name])}"
    service.key_value_set(f"{key}/{jax.process_index()}", value)
    try:
        service.wait_at_barrier(key, max(int(timeout * 1000), 1))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        present = {process for process, _ in _values(service, key)}
        missing = [str(process) for process in range(count) if process not in present]
        raise MissingProcessesError(
            f"waited {timeout:g} s for all {count} processes at {name!r}; missing: process "
            f"{', '.join(missing) or '(came late)'}. Its own log says what it was doing"
        ) from error
    return [text for _, text in sorted(_values(service, key))]


def meet(name: str, value: str, while_waiting: Callable[[], None]) -> list[str]:
    """Returns the same as `gather` without a timeout, for work of very different durations.

    Args:
      while_waiting: called twice a second.
    """
    service = client()
    if service is None:
        return [value]
    key = f"cwcl_jax/{name}/{next(_uses[name])}"
    service.key_value_set(f"{key}/{jax.process_index()}", value)
    while len(_values(service, key)) < jax.process_count():
        while_waiting()
        time.sleep(0.5)
    return [text for _, text in sorted(_values(service, key))]


def _values(service: Any, key: str) -> list[tuple[int, str]]:
    pairs = service.key_value_dir_get(f"{key}/")
    return [(int(path.rpartition("/")[2]), value) for path, value in pairs]


def set_flag(name: str) -> None:
    """Sets a flag that every process can see."""
    service = client()
    if service is not None:
        service.key_value_set(f"cwcl_jax/flag/{name}", "1", allow_overwrite=True)


def flag_is_set(name: str) -> bool:
    """Returns whether any process has set the flag."""
    return _is_set(f"cwcl_jax/flag/{name}")


def preemption_is_noticed() -> bool:
    """Returns whether jax's runtime received SIGTERM in any process, without agreement on a step.

    The key is that of XLA's preemption_sync_manager.cc.
    """
    return _is_set("RECEIVED_PREEMPTION_NOTICE")


def _is_set(key: str) -> bool:
    service = client()
    if service is None:
        return False
    try:
        service.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:
        return False
    return True
