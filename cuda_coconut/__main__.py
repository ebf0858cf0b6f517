"""`cuda-coconut VERB ...`, the same as `python -m cuda_coconut VERB ...`: every verb, in torch."""

from __future__ import annotations

from collections.abc import Sequence

from coconut.commands import verbs
from cuda_coconut.run import make_backend, make_world


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; bad input is one message on stderr and status 2."""
    verbs.main("cuda_coconut", make_backend, make_world, argv)


if __name__ == "__main__":
    main()
