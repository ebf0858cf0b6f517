"""The twins share files, names, arguments and first docstring lines, or declare why not."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOML = ROOT / "tests" / "house" / "twin_differences.toml"
DECLARED = tomllib.loads(TOML.read_text())["difference"]


def files(package: str) -> set[str]:
    return {str(p.relative_to(ROOT / package)) for p in (ROOT / package).rglob("*.py")}


def public_names(path: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments, first docstring line); methods as Class.method, `__call__` as forward."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                name = "forward" if node.name == "__call__" else node.name
                if name.startswith("_") and name != "__init__":
                    continue
                arguments = []
                if isinstance(node, ast.FunctionDef):
                    a = node.args
                    arguments = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs]
                doc = (ast.get_docstring(node) or "").split("\n")[0].replace("MLX", "torch")
                found[prefix + name] = (arguments, doc)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name) and not name.id.startswith("_"):
                            found[prefix + name.id] = ([], "")

    visit(ast.parse(path.read_text()).body, "")
    return found


def differences() -> set[str]:
    """`FILE`, `FILE:NAME`, `FILE:NAME arguments` or `FILE:NAME docstring` for each difference."""
    ours, theirs = files("mlx_coconut"), files("cuda_coconut")
    found = ours ^ theirs
    for file in ours & theirs:
        a, b = (public_names(ROOT / p / file) for p in ("mlx_coconut", "cuda_coconut"))
        found |= {f"{file}:{name}" for name in a.keys() ^ b.keys()}
        for name in a.keys() & b.keys():
            found |= {f"{file}:{name} arguments"} if a[name][0] != b[name][0] else set()
            found |= {f"{file}:{name} docstring"} if a[name][1] != b[name][1] else set()
    return found


def covered() -> set[str]:
    """The differences that are declared, those of `FILE:*` too."""
    declared = {name for entry in DECLARED for name in entry["names"]}
    return {d for d in differences() if d in declared or f"{d.partition(':')[0]}:*" in declared}


def test_every_difference_between_the_twins_is_declared_with_its_reason():
    assert differences() - covered() == set()
    assert all(entry["reason"].strip() for entry in DECLARED)


def test_no_declared_difference_is_out_of_date():
    declared = {name for entry in DECLARED for name in entry["names"]}
    whole = {f"{d.partition(':')[0]}:*" for d in differences()}
    assert declared - differences() - whole == set()
