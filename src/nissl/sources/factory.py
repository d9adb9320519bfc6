"""What ``package.module:name`` stands for, imported and called."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nissl.errors import InputError, NisslError

_SPEC = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_factory(spec: str) -> bool:
    """Tell whether `spec` has the form ``package.module:name``."""
    return _SPEC.fullmatch(spec) is not None


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Search the current folder first for modules, as ``python -m`` does.

    It stays on the path when all went well, because what was made may import its neighbours later; after an error the
    path is as before.
    """
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    except BaseException:
        if added:
            sys.path.remove(here)
        raise


def call_factory(spec: str, ready: tuple[type, ...]) -> Any:
    """Import ``package.module:name`` and give what it makes.

    Parameters
    ----------
    spec : str
        Module and attribute; dots in the attribute are followed.
    ready : tuple of type
        Instances of these, and fitted estimators, are given as they are; anything else callable is called without
        arguments.

    Returns
    -------
    Any
        What the factory returned.

    Raises
    ------
    InputError
        The module or the name does not exist, importing or calling it failed, or it needs arguments.
    """
    module_name, _, path = spec.partition(":")
    return _make(_find(module_name, path), spec, ready)


def _find(module_name: str, path: str) -> Any:
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(
                f"there is no module {error.name!r}, neither in the current folder nor among the installed packages; "
                f"run from the folder that holds it, or install it"
            ) from error
        raise InputError(f"{module_name} imports {error.name!r}, which is not installed; install it first") from error
    except NisslError:
        raise
    except (Exception, SystemExit) as error:  # the user's module may fail, or try to exit, in any way
        raise InputError(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [n for n in dir(found) if not n.startswith("_")], 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"{module_name} has nothing called {path!r}{hint}")
        found = getattr(found, name)
    return found


def _make(found: Any, spec: str, ready: tuple[type, ...]) -> Any:
    if isinstance(found, ready) or (hasattr(found, "predict") and not isinstance(found, type)):
        return found
    if not callable(found):
        raise InputError(f"{spec} is a {type(found).__name__}; expected a function without arguments that makes it")
    try:
        needed = [
            p.name
            for p in inspect.signature(found).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # some built-in callables have no signature: the call will tell
        needed = []
    if needed:
        raise InputError(
            f"{spec} needs arguments ({', '.join(needed)}) and is called without any; write a function without "
            "arguments that returns the model, the prediction function or the data"
        )
    try:
        return found()
    except NisslError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may fail, or try to exit, in any way
        raise InputError(f"calling {spec} failed: {type(error).__name__}: {error}") from error
