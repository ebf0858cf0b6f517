"""The search for a fast BLAS: it says what it found, and MLX works either way."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import CHOSEN

pytestmark = pytest.mark.skipif(
    "mlx" not in CHOSEN or not sys.platform.startswith("linux"), reason="MLX on Linux only"
)


def say(**environment: str) -> str:
    """The log line, and a product computed after it, in a process of its own."""
    code = (
        "import mlx_coconut, mlx.core as mx; print(mlx_coconut.blas.STATUS);"
        "print((mx.ones((3, 4)) @ mx.ones((4, 2))).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    line, total = done.stdout.splitlines()
    assert float(total) == 24
    return line


def test_it_says_which_library_it_loaded() -> None:
    assert say().startswith("BLAS: ")


def test_none_leaves_mlx_as_it_is() -> None:
    assert "COCONUT_BLAS=none" in say(COCONUT_BLAS="none")


def test_a_library_that_cannot_be_loaded_is_named_and_the_next_one_taken() -> None:
    line = say(COCONUT_BLAS="libnowhere.so")
    assert "COCONUT_BLAS=libnowhere.so cannot be loaded" in line
    assert line.startswith(say(COCONUT_BLAS="").split(";")[0])


def test_without_a_compiler_it_says_so() -> None:
    assert "no g++" in say(PATH="/nowhere")
