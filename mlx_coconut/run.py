"""`python -m mlx_coconut.run ARGS.yaml [key=value ...] [--check]`: train or evaluate in MLX."""

from __future__ import annotations

from coconut.cli import main


def make_backend(config, source):
    """The MLX back end; imported here so that a wrong configuration costs no start-up time."""
    from mlx_coconut.backend import Backend

    return Backend(config, source)


if __name__ == "__main__":
    main("mlx_coconut", make_backend)
