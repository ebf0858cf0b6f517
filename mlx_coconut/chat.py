"""`python -m mlx_coconut.chat --model DIR`: a conversation with a checkpoint in MLX."""

from __future__ import annotations

from coconut.inside.chat import main
from mlx_coconut.run import make_backend

if __name__ == "__main__":
    main("mlx_coconut", make_backend)
