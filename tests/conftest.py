"""The twins as fixtures, and how the suite runs: uncompiled, in parallel, fast or in full."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

TWINS = {"mlx": "mlx_coconut", "cuda": "cuda_coconut"}
"""Name in the TWINS environment variable -> package."""

CHOSEN = os.environ.get("TWINS", "mlx,cuda").split(",")
"""What must run: a twin named here that cannot be imported fails, it is not skipped."""

# Each shape of a compiled step costs seconds of a C++ compiler on a CPU: only what is marked
# `compiled` is. Processes that a test starts inherit it.
os.environ["MLX_DISABLE_COMPILE"] = "1"
# Where a GPU would round float32 products to 10 bits, no tolerance here would hold.
os.environ["MLX_ENABLE_TF32"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tiny arrays: a second thread waits for the core on which the next worker computes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# On a busy machine it takes long to draw an input, which says nothing about the code.
calm: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    "derandomize": "CI" in os.environ,
}
hypothesis.settings.register_profile("whole", max_examples=100, **calm)
hypothesis.settings.register_profile("fast", max_examples=12, **calm)
hypothesis.settings.load_profile("whole")


class Twin:
    """The modules of one package by their names, from all its rooms, imported at first use."""

    def __init__(self, name: str):
        self.__name__ = TWINS[name]
        folder = Path(importlib.import_module(self.__name__).__file__ or "").parent
        files = [p.relative_to(folder.parent) for p in folder.rglob("*.py")]
        places = [p.parent if p.name == "__init__.py" else p.with_suffix("") for p in files]
        self._places = {p.name: ".".join(p.parts) for p in places if p.name != "__main__"}

    def __getattr__(self, name: str) -> Any:
        if name not in self._places:
            raise AttributeError(f"{self.__name__} has no module {name}")
        module = importlib.import_module(self._places[name])
        setattr(self, name, module)
        return module


@pytest.fixture(params=CHOSEN)
def twin(request: pytest.FixtureRequest) -> Any:
    """The modules of one twin by their names: `twin.latent.latent_forward(...)`."""
    return load_twin(request.param)


@cache
def load_twin(name: str) -> Any:
    """The modules of the package that `name` ("mlx" or "cuda") stands for."""
    if name not in TWINS:
        pytest.fail(f"TWINS names {name!r}; known: {', '.join(TWINS)}")
    twin = Twin(name)
    if name == "mlx" and "COCONUT_DEVICE" in os.environ:  # for tests that open no back end
        twin.backend.start_device(os.environ["COCONUT_DEVICE"], tf32=False)
    return twin


def few(cases: Iterable[Any], n: int) -> list[Any]:
    """The cases, of which n, spread evenly from the first, are in the fast suite.

    A tuple holds a case's values of several names.
    """
    cases = list(cases)
    fast = {i * len(cases) // n for i in range(n)}
    return [case if i in fast else _slow(case) for i, case in enumerate(cases)]


def _slow(case: Any) -> Any:
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)


def examples(n: int) -> hypothesis.settings:
    """So many inputs are drawn in the whole suite, an eighth of them in the fast one."""
    return hypothesis.settings(max_examples=n * hypothesis.settings.default.max_examples // 100)


def gpt2_encoding() -> Any:
    """GPT-2's encoding, in tests that need the published one; without it they are skipped."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs TIKTOKEN_CACHE_DIR with the GPT-2 vocabulary")
    from coconut.text import tiktoken

    return tiktoken.gpt2_encoding()


@pytest.fixture(autouse=True)
def _compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let MLX compile in a test that is marked so, here and in the processes that it starts."""
    if "mlx" not in CHOSEN or request.node.get_closest_marker("compiled") is None:
        yield
        return
    monkeypatch.delenv("MLX_DISABLE_COMPILE")
    load_twin("mlx")  # its BLAS comes before mlx.core
    import mlx.core as mx

    mx.enable_compile()
    yield
    mx.disable_compile()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where torch sees none."""
    if item.get_closest_marker("gpu"):
        if not pytest.importorskip("torch").cuda.is_available():
            pytest.skip("needs a CUDA GPU")


COLLECTED = pytest.StashKey[dict[str, bool]]()
"""Test file -> whether one of its cases belongs to the fast suite."""
IMPORTED = pytest.StashKey[set[str]]()
"""What had been imported when all test files had been read."""


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    files: dict[str, bool] = {}
    for item in items:
        file = item.nodeid.partition("::")[0]
        files[file] = files.get(file, False) or item.get_closest_marker("slow") is None
    config.stash[COLLECTED] = files
    config.stash[IMPORTED] = set(sys.modules)
