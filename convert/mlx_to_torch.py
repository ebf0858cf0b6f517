"""From MLX to torch: any known checkpoint to our directory, or to the published state dict.

python convert/mlx_to_torch.py runs/prosqa-coconut/epoch_50 runs/prosqa-coconut-torch
python convert/mlx_to_torch.py runs/prosqa-coconut/epoch_50 --official checkpoint_50
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as `python convert/mlx_to_torch.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from coconut.convert import command

main = partial(command.main, "cuda_coconut", prog="python convert/mlx_to_torch.py")

if __name__ == "__main__":
    main()
