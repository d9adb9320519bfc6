"""The errors nissl raises: what was given, what was expected, what to do."""


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


class MissingExtraError(NisslError, ImportError):
    """An optional dependency is needed; says which extra installs it."""
