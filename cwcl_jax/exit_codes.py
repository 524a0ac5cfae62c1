"""Exit codes, the same for every entry file and known to the launchers."""

from __future__ import annotations

from cwcl_jax.config import ConfigError
from cwcl_jax.data.skipping import TooManyBadExamples
from cwcl_jax.early import PREEMPTED as PREEMPTED  # one of the codes
from cwcl_jax.packages import MissingPackage

DONE = 0
FAILED = 1
BAD_CONFIG = 2
WATCHDOG = 43
# Errors that a person must correct in the settings or the data: a retry cannot succeed.
MISTAKES = (ConfigError, TooManyBadExamples, MissingPackage)


def exit_code(error: BaseException) -> int:
    """Returns the exit code for an exception that ends the process."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, TimeoutError):
        return WATCHDOG
    return BAD_CONFIG if isinstance(error, MISTAKES) else FAILED
