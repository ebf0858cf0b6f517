"""Who may import whom. Read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STDLIB = set(sys.stdlib_module_names)

ANYWHERE = {
    "coconut": {
        *(
            "coconut",
            "numpy",
            "yaml",
            "tiktoken",
            "tokenizers",
            "rich",
            "huggingface_hub",
            "jinja2",
        ),
    },
    "mlx_coconut": {"mlx_coconut", "coconut", "mlx", "mlx_lm", "numpy"},
    "cuda_coconut": {"cuda_coconut", "coconut", "torch", "safetensors", "numpy"},
    "convert": {"convert", "coconut", "safetensors", "numpy"},
    "data": {"data", "coconut.errors", "rich"},
}
"""Package -> what its files may import at module level."""

INSIDE_FUNCTIONS = {
    "coconut": {"data", "transformers", "huggingface_hub", "matplotlib"},
    "mlx_coconut": {"transformers"},
    "cuda_coconut": {"transformers", "peft"},
    "convert": {"torch", "mlx", "mlx_coconut", "cuda_coconut", "transformers", "mlx_lm"},
    "data": {"huggingface_hub", "coconut"},
}
"""Package -> what only functions may import, so that opening the module stays cheap."""

FILES = [path for package in ANYWHERE for path in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.Module) -> list[tuple[str, bool]]:
    """(module, whether at module level) of every import that runs."""
    found = []

    def visit(node: ast.AST, is_top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, is_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative import; write the package's name"
                found.append((child.module or "", is_top))
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            else:
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                visit(child, is_top and not is_function)

    visit(tree, True)
    return found


def is_allowed(module: str, allowed: set[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[: n + 1]) in allowed for n in range(len(parts)))


def broken_rules(package: str, source: str) -> list[str]:
    top = STDLIB | ANYWHERE[package]
    inside = top | INSIDE_FUNCTIONS[package]
    return [
        module
        for module, is_top in imports(ast.parse(source))
        if not is_allowed(module, top if is_top else inside)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_package_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert broken_rules(package, path.read_text()) == []


def test_every_package_is_held_to_a_rule() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "bench"}
    assert packages <= set(ANYWHERE)


@pytest.mark.parametrize(
    "package, source, broken",
    [
        ("coconut", "import mlx.core as mx", ["mlx.core"]),
        ("coconut", "def f():\n    import torch", ["torch"]),
        ("coconut", "from data import prosqa", ["data"]),
        ("coconut", "def f():\n    from data import prosqa", []),
        ("coconut", "import transformers", ["transformers"]),
        ("coconut", "if TYPE_CHECKING:\n    import torch", []),
        ("coconut", "try:\n    import torch\nexcept ImportError: pass", ["torch"]),
        ("mlx_coconut", "from cuda_coconut import train", ["cuda_coconut"]),
        ("mlx_coconut", "def f():\n    import torch", ["torch"]),
        ("cuda_coconut", "import mlx", ["mlx"]),
        ("convert", "import torch", ["torch"]),
        ("convert", "def f():\n    import torch", []),
        ("data", "from coconut.config import RunConfig", ["coconut.config"]),
        ("data", "from coconut.errors import UserError", []),
        ("data", "import numpy", ["numpy"]),
    ],
)
def test_the_rules_see_what_they_are_for(package: str, source: str, broken: list[str]) -> None:
    assert broken_rules(package, source) == broken
