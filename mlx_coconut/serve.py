"""`python -m mlx_coconut.serve --model DIR`: the live page of inspect, on this machine."""

from __future__ import annotations

from coconut.inside.page.serve import main
from mlx_coconut.run import make_backend

if __name__ == "__main__":
    main("mlx_coconut", make_backend)
