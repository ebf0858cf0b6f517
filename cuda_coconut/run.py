"""`python -m cuda_coconut.run ARGS.yaml [key=value ...] [--check]`: train or evaluate in torch."""

from __future__ import annotations

from coconut.cli import main


def make_backend(config, source):
    """The torch back end; imported here so that a wrong configuration costs no start-up time."""
    from cuda_coconut.backend import Backend

    return Backend(config, source)


if __name__ == "__main__":
    main("cuda_coconut", make_backend)
