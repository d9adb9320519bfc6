"""Packages that only some recordings need."""

from __future__ import annotations

import importlib
from typing import Any

from nissl.errors import MissingExtraError, said


def need(module: str, extra: str = "recordings") -> Any:
    """A module of an optional package, imported; MissingExtraError, which says what installs it, where that fails.

    Parameters
    ----------
    module : str
        Dotted name, such as ``"mne"`` or ``"mne.decoding"``.
    extra : str, default "recordings"
        The extra of nissl that holds the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} cannot be imported ({said(error)}); install it with: pip install 'nissl[{extra}]'"
        ) from error
