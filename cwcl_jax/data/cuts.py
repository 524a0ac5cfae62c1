"""Counts what is cut of inputs while they are made, without a word of it in their arrays.

A tokenizer is shared by training, validation and evaluation; who wants to know what it cuts says so
around the call, in the same thread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ADD: ContextVar[Callable[[int], None] | None] = ContextVar("cwcl_jax_cuts", default=None)


@contextmanager
def counting_cuts(add: Callable[[int], None]) -> Iterator[None]:
    """Calls `add` with the number of tokens that are cut inside of the block."""
    token = _ADD.set(add)
    try:
        yield
    finally:
        _ADD.reset(token)


def tell_cut(tokens: Callable[[], int]) -> None:
    """Tells whoever counts; `tokens` is called only if someone does."""
    add = _ADD.get()
    if add is not None:
        add(tokens())
