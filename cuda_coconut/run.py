"""`python -m cuda_coconut.run ARGS.yaml [key=value ...] [--check]`: train or evaluate in torch."""

import os
import sys
from pathlib import Path

if not __package__:  # run as `python cuda_coconut/run.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from coconut.commands import verbs
from coconut.errors import UserError
from coconut.world import World
from cuda_coconut import make_backend


def make_world():
    """The processes this one was launched with; itself alone without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from cuda_coconut.world import Processes

        return Processes()
    if "MLX_RANK" in os.environ:
        raise UserError(
            "mlx.launch", "starts the MLX twin; here: torchrun --nproc_per_node N -m ..."
        )
    return World()


def main(argv=None):
    """Run one verb; bad input is one message on stderr and status 2."""
    verbs.main("cuda_coconut", make_backend, make_world, argv)


if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
