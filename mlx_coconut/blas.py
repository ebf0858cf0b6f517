"""Gives MLX on Linux a fast BLAS. Must run before `mlx.core` is first imported.

The Linux wheel links the reference BLAS by its usual symbols; a faster library that is loaded first
with global symbols takes its place. Measured: matrix products 20 to 30 times faster.
"""

import ctypes
import os
import shutil
import sys
from pathlib import Path

CANDIDATES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.3", "libmkl_rt.so.2")
"""Tried in this order by the system's loader, then where PyPI's mkl puts its library."""


def load() -> str:
    """Load the first fast BLAS found. Returns a line for the log: which one, or what to do.

    COCONUT_BLAS names a library to try first; COCONUT_BLAS=none leaves MLX as it is.
    """
    if not sys.platform.startswith("linux"):
        return ""
    if "mlx.core" in sys.modules:
        return "BLAS: MLX was imported first and keeps its own"
    wanted = os.environ.get("COCONUT_BLAS")
    if wanted == "none":
        return "BLAS: MLX's own, as COCONUT_BLAS=none asks"
    in_prefix = sorted(str(p) for p in Path(sys.prefix, "lib").glob("libmkl_rt.so.*"))
    # The default threading layer of mkl wants a library of its own; GNU's is always there.
    os.environ.setdefault("MKL_THREADING_LAYER", "GNU")
    missing = ""
    for name in [wanted, *CANDIDATES, *in_prefix]:
        try:
            if name:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
                return f"BLAS: {name}{missing}"
        except OSError as error:
            if name == wanted:
                missing = f"; COCONUT_BLAS={wanted} cannot be loaded ({error})"
    return (
        "BLAS: MLX's slow reference BLAS; `apt install libopenblas0` or `pip install mkl` makes"
        f" matrix products 20 to 30 times faster{missing}"
    )


def compiler_note() -> str:
    """What to say where MLX's CPU back end finds no compiler for its fused kernels; else empty."""
    if not sys.platform.startswith("linux") or shutil.which("g++"):
        return ""
    return "; no g++: elementwise kernels stay unfused, `apt install g++` makes them faster"


STATUS = load() + compiler_note()
