"""`mlx-coconut VERB ...`, the same as `python -m mlx_coconut VERB ...`: every verb, in MLX."""

from __future__ import annotations

from collections.abc import Sequence

from coconut.commands import verbs
from mlx_coconut.run import make_backend, make_world


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; bad input is one message on stderr and status 2."""
    verbs.main("mlx_coconut", make_backend, make_world, argv)


if __name__ == "__main__":
    main()
