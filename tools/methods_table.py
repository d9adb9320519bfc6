"""Print docs/methods.md: every exported attribution method, from the code itself."""

from __future__ import annotations

import dataclasses
import inspect

import nissl.attribution
from nissl.attribution import Method

HEAD = """# Methods

<!-- Made from nissl.attribution by `make tables`; edit the classes. -->

A method is a class of `nissl.attribution`; its key is its name on the command line and in `nissl.audit`. *Gradients*
says whether it needs them: a method that does not works with any function that predicts. *Complete* methods promise
that their scores add up to the difference of the output to that at a baseline.

| key | method | what its scores are | parameters | gradients | complete | source |
|---|---|---|---|---|---|---|
"""


def methods() -> list[type[Method]]:
    """Exported classes that can be run, by key."""
    found = [getattr(nissl.attribution, name) for name in nissl.attribution.__all__]
    found = [m for m in found if inspect.isclass(m) and issubclass(m, Method) and not inspect.isabstract(m)]
    return sorted(found, key=lambda m: m.name)


def row(method: type[Method]) -> str:
    """One line of the table."""
    about = " ".join((inspect.getdoc(method) or "").split("\n\n")[0].split())
    parameters = ", ".join(f"`{f.name}={_default(f)}`" for f in dataclasses.fields(method)) or "none"  # type: ignore[arg-type]
    cells = [
        f"`{method.name}`",
        f"[{method.title}][nissl.attribution.{method.__name__}]",
        about,
        parameters,
        "yes" if method.differentiates else "no",
        "yes" if method.complete else "no",
        method.paper,
    ]
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _default(f: dataclasses.Field[object]) -> str:
    if f.default is not dataclasses.MISSING:
        return repr(f.default)
    return repr(f.default_factory()) if f.default_factory is not dataclasses.MISSING else "…"


def methods_markdown() -> str:
    """The whole page."""
    return HEAD + "".join(row(m) + "\n" for m in methods())


if __name__ == "__main__":
    print(methods_markdown(), end="")
