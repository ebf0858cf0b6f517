"""The fixture that runs one test on both twins."""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import ModuleType

import pytest

TWINS = {"mlx": "mlx_coconut", "cuda": "cuda_coconut"}
"""Name in the TWINS environment variable -> package."""

CHOSEN = os.environ.get("TWINS", "mlx,cuda").split(",")
"""What must run: a twin named here that cannot be imported fails, it is not skipped."""


@pytest.fixture(params=CHOSEN)
def twin(request: pytest.FixtureRequest) -> ModuleType:
    """The package of one twin, its modules imported: `twin.latent.latent_forward(...)`."""
    return load_twin(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where torch sees none."""
    if item.get_closest_marker("gpu"):
        if not pytest.importorskip("torch").cuda.is_available():
            pytest.skip("needs a CUDA GPU")


def load_twin(name: str) -> ModuleType:
    """The package that `name` ("mlx" or "cuda") stands for, with all its modules imported."""
    if name not in TWINS:
        pytest.fail(f"TWINS names {name!r}; known: {', '.join(TWINS)}")
    package = importlib.import_module(TWINS[name])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return package
