"""pyproject.toml, constraints.txt and the code agree."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nissl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {k: [Requirement(r) for r in v] for k, v in PROJECT["optional-dependencies"].items()}
RUNTIME = [Requirement(r) for r in PROJECT["dependencies"]]
PINNED = ("demo", "dev", "bench")


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of the packages that a module imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def test_everything_imported_is_declared() -> None:
    declared = {canonicalize_name(r.name) for r in RUNTIME}
    declared |= {canonicalize_name(r.name) for k, v in EXTRAS.items() if k not in ("dev", "bench") for r in v}
    owners = packages_distributions()
    for file in (ROOT / "src").rglob("*.py"):
        used = imports(ast.parse(file.read_text(encoding="utf-8"))) - set(sys.stdlib_module_names) - {"nissl"}
        for name in used:
            packages = {canonicalize_name(p) for p in owners.get(name, [name])}
            assert packages & declared, f"{file.relative_to(ROOT)} imports {name}, which pyproject.toml does not name"


def test_every_requirement_is_pinned_to_a_version_that_fits() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(r.name): r for r in map(Requirement, (x for x in lines if x and not x.startswith("#")))}
    assert len(pins) == len([x for x in lines if x and not x.startswith("#")])
    for requirement in RUNTIME + [r for k in PINNED for r in EXTRAS[k]]:
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} is pinned to {pin}"


def test_the_demo_is_exact() -> None:
    assert all([s.operator for s in r.specifier] == ["=="] for r in EXTRAS["demo"])


def test_the_changelog_knows_this_version() -> None:
    assert f"\n## {nissl.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
