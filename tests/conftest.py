"""The fixture that runs one test on both twins."""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest

TWINS = {"mlx": "mlx_coconut", "cuda": "cuda_coconut"}
"""Name in the TWINS environment variable -> package."""

CHOSEN = os.environ.get("TWINS", "mlx,cuda").split(",")
"""What must run: a twin named here that cannot be imported fails, it is not skipped."""


@pytest.fixture(params=CHOSEN)
def twin(request: pytest.FixtureRequest) -> Any:
    """The modules of one twin by their names: `twin.latent.latent_forward(...)`."""
    return load_twin(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where torch sees none."""
    if item.get_closest_marker("gpu"):
        if not pytest.importorskip("torch").cuda.is_available():
            pytest.skip("needs a CUDA GPU")


def load_twin(name: str) -> Any:
    """The modules of the package that `name` ("mlx" or "cuda") stands for, from all its rooms."""
    if name not in TWINS:
        pytest.fail(f"TWINS names {name!r}; known: {', '.join(TWINS)}")
    package = importlib.import_module(TWINS[name])
    found: dict[str, Any] = {"__name__": package.__name__}
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            found[module.name.rpartition(".")[2]] = importlib.import_module(module.name)
    return SimpleNamespace(**found)
