"""The errors nissl raises: what was given, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class NisslError(Exception):
    """Base of every error that nissl raises on purpose."""


class InputError(NisslError, ValueError):
    """An argument has the wrong shape, type, range or content."""


class SiteError(NisslError, LookupError):
    """A site address names nothing, or more than one place, in the network."""


class TargetError(NisslError, ValueError):
    """A target does not fit the output of the network."""


class GradientError(NisslError, RuntimeError):
    """A gradient was asked for where none can be had."""


class RuleError(NisslError, RuntimeError):
    """A backward rule set met an operation that it cannot handle."""


class BusyError(NisslError, RuntimeError):
    """One network was used from two threads at once."""


class NonFiniteError(NisslError, ArithmeticError):
    """NaN or infinity appeared in an answer; names the first site where it did."""


class RunFolderError(NisslError, OSError):
    """A run folder or an output file cannot be read, written or resumed."""


class FinishedRunError(RunFolderError):
    """A run that is to be resumed is finished already."""


class MissingExtraError(NisslError, ImportError):
    """An optional dependency is needed; says which extra installs it."""


def said(error: BaseException) -> str:
    """An error in one line: its type and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory that is not there."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory")
    )


@contextmanager
def blame(kind: type[NisslError], what: str) -> Iterator[None]:
    """Raise errors of code that is not nissl's, such as a model or a user's function, as one of nissl's own.

    Want of memory stays what it is: the Runner takes smaller batches then.
    """
    try:
        yield
    except NisslError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise kind(f"{what}: {said(error)}") from error
