"""Counts what is truncated while inputs are prepared, separately from their arrays.

A tokenizer is shared by training, validation and evaluation. A caller that needs the number of
truncated tokens wraps the call in `counting_cuts`, in the same thread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ADD: ContextVar[Callable[[int], None] | None] = ContextVar("cwcl_jax_cuts", default=None)


@contextmanager
def counting_cuts(add: Callable[[int], None]) -> Iterator[None]:
    """Calls `add` with the number of tokens that are truncated inside the block."""
    token = _ADD.set(add)
    try:
        yield
    finally:
        _ADD.reset(token)


def tell_cut(tokens: Callable[[], int]) -> None:
    """Reports truncated tokens to the counter; `tokens` is called only if there is one."""
    add = _ADD.get()
    if add is not None:
        add(tokens())
