"""`python -m mlx_coconut.fuse DIR OUT`: make a whole checkpoint of one that holds an adapter."""

from __future__ import annotations

from coconut.commands.fuse import main
from mlx_coconut.run import make_backend

if __name__ == "__main__":
    main("mlx_coconut", make_backend)
