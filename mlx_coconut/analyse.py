"""`python -m mlx_coconut.analyse WHAT --model DIR`: what thoughts do over a data set, in MLX."""

from __future__ import annotations

from coconut.inside.analyse import main
from mlx_coconut.run import make_backend

if __name__ == "__main__":
    main("mlx_coconut", make_backend)
