"""Who may import whom: rooms, read from the source, so that lazy and type-only imports count too.

Arrows run down ROOMS. A file may import what stands below its room, and neighbours in its room
where no circle arises. CONTRIBUTING.md says what lives where.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST, MOST = 350, 12
"""Lines of a file; files of a room."""

BASE = ("coconut.world", "coconut.lock", "coconut.files", "coconut.errors")
GRAMMAR = ("coconut.feedback.catalogue", "coconut.feedback.layers", "coconut.feedback.rules")
"""What a feedback rule may be: the part of its room that stands below the keys of a run."""
CONFIG = ("coconut.config", "coconut.tasks", *GRAMMAR, *BASE)
TEXT = ("coconut.text", *CONFIG)
BATCHES = ("coconut.batches", *TEXT)
FEEDBACK = ("coconut.feedback", "coconut.blocks", *BATCHES)
CACHES = ("coconut.caches", "coconut.blocks", *BATCHES)
CHECKPOINTS = ("coconut.checkpoints", *FEEDBACK)
BACKEND = ("coconut.backend", "coconut.caches", *CHECKPOINTS)
BELOW = (*BACKEND, "coconut.convert", "coconut.reporting")

ROOMS: dict[str, tuple[str, ...]] = {
    "coconut": (),
    "coconut.files": BASE,
    "coconut.lock": BASE,
    "coconut.world": BASE,
    "coconut.tasks": ("coconut.tasks", *BASE),
    **dict.fromkeys(GRAMMAR, (*GRAMMAR, *BASE)),
    "coconut.config": CONFIG,
    "coconut.reporting": ("coconut.reporting", *CONFIG),
    "coconut.text": TEXT,
    "coconut.batches": BATCHES,
    "coconut.blocks": BASE,
    "coconut.caches": CACHES,
    "coconut.feedback": FEEDBACK,
    "coconut.checkpoints": CHECKPOINTS,
    "coconut.backend": BACKEND,
    "coconut.convert": ("coconut.convert", *BACKEND),
    "coconut.run": ("coconut.run", *BELOW),
    "coconut.inside": ("coconut.inside", *BELOW),
    "coconut.plan": ("coconut.plan", "coconut.run", *BELOW),
    "coconut.commands": ("coconut",),
    **{
        f"{twin}.{room}": (*(f"{twin}.{below}" for below in rooms), *BACKEND)
        for twin in ("mlx_coconut", "cuda_coconut")
        for room, rooms in {
            "models": ("models",),
            "thoughts": ("thoughts", "models"),
            "updates": ("updates", "thoughts", "models"),
        }.items()
    },
    # A twin's entry files and its public face see all of coconut.
    "mlx_coconut": ("mlx_coconut", "coconut"),
    "cuda_coconut": ("cuda_coconut", "coconut"),
    "data": ("coconut.tasks", *BASE),
    "convert": ("coconut.convert",),
}
"""Room -> what its files may import of the project; the longest name that fits is a file's room."""

LIBRARIES: dict[str, dict[str, set[str]]] = {
    "coconut": {
        "anywhere": {
            *("numpy", "yaml", "tiktoken", "tokenizers", "rich", "huggingface_hub", "jinja2"),
            "safetensors",
        },
        "inside functions": {"transformers", "matplotlib"},
    },
    "coconut.convert": {
        "anywhere": {"numpy", "safetensors"},
        "inside functions": {"torch", "mlx", "transformers", "mlx_lm"},
    },
    "coconut.tasks": {"anywhere": {"rich"}, "inside functions": {"datasets"}},
    "mlx_coconut": {"anywhere": {"mlx", "mlx_lm", "numpy"}, "inside functions": {"transformers"}},
    "cuda_coconut": {
        "anywhere": {"torch", "safetensors", "numpy"},
        "inside functions": {"transformers", "peft"},
    },
    "data": {"anywhere": {"rich"}, "inside functions": {"huggingface_hub"}},
    "convert": {"anywhere": set(), "inside functions": set()},
}
"""Package or room -> libraries beside Python's own: at module level, and inside functions only, so
that opening a module stays cheap."""

PACKAGES = ("coconut", "mlx_coconut", "cuda_coconut", "data", "convert")
STDLIB = set(sys.stdlib_module_names)


def sources() -> dict[str, str]:
    """Module -> its text, of every file outside tests and bench."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if "shipped" not in path.parts
    }


def longest(names: Mapping[str, object], module: str) -> str:
    """The longest of the names that a module's begins with."""
    fits = [name for name in names if f"{module}.".startswith(f"{name}.")]
    assert fits, f"{module} has no room: name one in ROOMS"
    return max(fits, key=len)


def imports(text: str, known: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """(module, whether at module level) of every import, TYPE_CHECKING and tables of names too."""

    def visit(node: ast.AST, is_top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, is_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative import; write the package's name"
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield inner if inner in known else str(child.module), is_top
            elif isinstance(child, ast.Dict):
                # A module that is named by a string stands as a whole value in one literal table.
                values = [v.value for v in ast.walk(child) if isinstance(v, ast.Constant)]
                yield from ((v, False) for v in values if str(v) in known and "." in str(v))
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from visit(child, is_top and not is_function and not is_typing)

    yield from visit(ast.parse(text), True)


def broken_rules(module: str, text: str, known: Mapping[str, str]) -> list[str]:
    """The imports of a file that its room may not have."""
    allowed = ROOMS[longest(ROOMS, module)]
    libraries = LIBRARIES[longest(LIBRARIES, module)]
    package = module.split(".")[0]
    found = []
    for name, is_top in imports(text, known):
        if name.split(".")[0] in PACKAGES:
            if not any(f"{name}.".startswith(f"{room}.") for room in allowed):
                found.append(name)
        elif name.split(".")[0] not in STDLIB | libraries["anywhere"] | (
            set() if is_top else libraries["inside functions"]
        ):
            found.append(name)
    assert package in PACKAGES
    return found


def circle(texts: Mapping[str, str]) -> list[str]:
    """Files that import each other in a ring; empty if there is none."""
    known = {module.removesuffix(".__init__"): text for module, text in texts.items()}
    arrows = {m: {n for n, _ in imports(t, known) if n in known} for m, t in known.items()}
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for below in sorted(arrows[module] - {module}):
            if ring := walk(below, [*path, module]):
                return ring
        done.add(module)
        return []

    return next((ring for m in sorted(arrows) if (ring := walk(m, []))), [])


SOURCES = sources()
KNOWN = {module.removesuffix(".__init__"): "" for module in SOURCES}


@pytest.mark.parametrize("module", SOURCES)
def test_a_file_imports_only_what_its_room_may(module: str) -> None:
    assert broken_rules(module, SOURCES[module], KNOWN) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(SOURCES) == []


def test_no_module_is_named_by_a_string_that_is_put_together() -> None:
    calls = re.compile(r"(?:import_module|find_spec|run_module)\(f?[\"'](\w+)")
    own = {
        module: names
        for module, text in SOURCES.items()
        if (names := set(calls.findall(text)) & set(PACKAGES))
    }
    assert own == {}, "look the module up in a literal table, which this test can read"


def rooms_that_are_full(texts: Mapping[str, str]) -> dict[str, int]:
    """Rooms with more files than MOST, `__init__` and a twin's entry files not counted."""
    counted: dict[str, int] = {}
    for module in texts:
        room, _, name = module.rpartition(".")
        if name != "__init__" and room not in ("data", "convert"):
            counted[room] = counted.get(room, 0) + 1
    return {room: n for room, n in counted.items() if n > MOST}


def test_a_room_holds_at_most_twelve_files() -> None:
    assert rooms_that_are_full(SOURCES) == {}


def files_that_are_long(texts: Mapping[str, str]) -> dict[str, int]:
    return {m: n for m, text in texts.items() if (n := text.count("\n")) > LONGEST}


def test_no_file_is_longer_than_one_reads_at_once() -> None:
    assert files_that_are_long(SOURCES) == {}


def test_nothing_that_is_installed_takes_a_name_that_others_need() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "bench"}
    assert packages == {"coconut", "mlx_coconut", "cuda_coconut"}
    assert not packages & STDLIB


@pytest.mark.parametrize(
    "module, text, broken",
    [
        ("coconut.run.x", "import mlx.core as mx", ["mlx.core"]),
        ("coconut.run.x", "def f():\n    import torch", ["torch"]),
        ("coconut.run.x", "from data import hops", ["data.hops"]),
        ("coconut.run.x", "import transformers", ["transformers"]),
        ("coconut.run.x", "def f():\n    import transformers", []),
        ("coconut.run.x", "if TYPE_CHECKING:\n    import torch", ["torch"]),
        ("coconut.run.x", "try:\n    import torch\nexcept ImportError: pass", ["torch"]),
        ("coconut.run.x", "from coconut.plan import memory", ["coconut.plan.memory"]),
        ("coconut.run.x", "from coconut.batches.batch import Batch", []),
        ("coconut.config.x", "from coconut.text.chat import f", ["coconut.text.chat"]),
        (
            "coconut.config.x",
            "def f():\n    from coconut.feedback.draws import g",
            ["coconut.feedback.draws"],
        ),
        ("coconut.config.x", "from coconut.feedback.rules import parse", []),
        ("coconut.tasks.x", "TABLE = {'a': 'coconut.run.start'}", ["coconut.run.start"]),
        (
            "mlx_coconut.models.x",
            "from cuda_coconut.updates import train",
            ["cuda_coconut.updates.train"],
        ),
        (
            "mlx_coconut.models.x",
            "from mlx_coconut.thoughts import latent",
            ["mlx_coconut.thoughts.latent"],
        ),
        ("mlx_coconut.thoughts.x", "from mlx_coconut.models import cache", []),
        ("mlx_coconut.thoughts.x", "from coconut.run import start", ["coconut.run.start"]),
        ("mlx_coconut.run", "from coconut.run import start", []),
        ("cuda_coconut.models.x", "import mlx", ["mlx"]),
        ("coconut.convert.x", "import torch", ["torch"]),
        ("coconut.convert.x", "def f():\n    import torch", []),
        ("data.x", "from coconut.config.keys import RunConfig", ["coconut.config.keys"]),
        ("data.x", "from coconut.errors import UserError", []),
        ("data.x", "import numpy", ["numpy"]),
    ],
)
def test_the_rules_see_what_they_are_for(module: str, text: str, broken: list[str]) -> None:
    assert broken_rules(module, text, KNOWN) == broken


@pytest.mark.parametrize(
    "back",
    [
        "from coconut.a import f",
        "def g():\n    from coconut.a import f",
        "if TYPE_CHECKING:\n    from coconut.a import f",
        "TABLE = {'name': 'coconut.a'}",
    ],
)
def test_a_circle_is_seen_however_it_is_closed(back: str) -> None:
    assert circle({"coconut.a": "from coconut import b", "coconut.b": back}) == [
        *("coconut.a", "coconut.b")
    ]
    assert circle({"coconut.a": "from coconut import b", "coconut.b": "import math"}) == []


def test_a_full_room_and_a_long_file_are_seen() -> None:
    assert rooms_that_are_full({f"coconut.run.f{i}": "" for i in range(13)}) == {"coconut.run": 13}
    assert files_that_are_long({"coconut.x": "\n" * 351, "coconut.y": "\n" * 350}) == {
        "coconut.x": 351
    }
