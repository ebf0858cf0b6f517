"""`python -m mlx_coconut.run ARGS.yaml [key=value ...] [--check]`: train or evaluate in MLX."""

import os
import sys
from pathlib import Path

if not __package__:  # run as `python mlx_coconut/run.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from coconut.commands import verbs
from coconut.errors import UserError
from coconut.world import World
from mlx_coconut import make_backend


def make_world():
    """The processes this one was launched with; itself alone without a launcher."""
    if "MLX_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
        from mlx_coconut import blas  # noqa: F401  (before mlx.core)
        from mlx_coconut.world import Processes

        return Processes()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun", "starts the torch twin; here: mlx.launch -n N -- python -m ...")
    return World()


def main(argv=None):
    """Run one verb; bad input is one message on stderr and status 2."""
    verbs.main("mlx_coconut", make_backend, make_world, argv)


if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
