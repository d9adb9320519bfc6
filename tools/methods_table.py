"""Print docs/methods.md: every attribution method, from the code itself."""

from __future__ import annotations

import dataclasses
import inspect

from nissl.attribution import METHODS, Method

HEAD = """# Methods

<!-- Made from nissl.attribution by `make tables`; edit the classes. -->

A method is a class of `nissl.attribution`. Its key is its name on the command line and in `nissl.audit`, with its
parameters where they differ from the defaults: `ig` or `"ig(steps=64, baseline='blur')"`.

*Gradients* says whether a method needs them. Where it needs none, a function that only predicts is enough, except for
class activation maps and attention, which look inside the network. *Complete* methods promise that their scores
add up to the difference of the output to that at a baseline. `random` and `edge` know nothing of the network: they are
the controls that other methods have to beat.

| key | method | what its scores are | parameters | gradients | complete | source |
|---|---|---|---|---|---|---|
"""


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
    return HEAD + "".join(row(m) + "\n" for m in METHODS.values())


if __name__ == "__main__":
    print(methods_markdown(), end="")
