"""The suite itself: what the fast part leaves out, and where MLX compiles."""

from __future__ import annotations

import os

import pytest
from conftest import CHOSEN, COLLECTED, IMPORTED


def test_the_fast_suite_has_a_case_of_every_file(request):
    files = request.config.stash[COLLECTED]
    assert [file for file, has_fast_case in files.items() if not has_fast_case] == []


def test_a_framework_is_imported_by_the_tests_that_use_it(request):
    seconds = {"mlx.core", "mlx_lm", "torch", "transformers", "peft", "matplotlib"}
    assert seconds & request.config.stash[IMPORTED] == set()


@pytest.mark.skipif("mlx" not in CHOSEN, reason="torch compiles nothing here")
@pytest.mark.parametrize("n_calls", [pytest.param(1, marks=pytest.mark.compiled, id="compiled"), 3])
def test_mlx_compiles_where_a_test_is_marked_so(n_calls):
    import mlx_coconut  # noqa: F401  (its BLAS comes before mlx.core)
    import mlx.core as mx  # isort: skip

    calls = []

    @mx.compile
    def double(x):
        calls.append(x)
        return 2 * x

    for _ in range(3):
        mx.eval(double(mx.ones(2)))
    assert len(calls) == n_calls
    assert ("MLX_DISABLE_COMPILE" in os.environ) == (n_calls == 3)
