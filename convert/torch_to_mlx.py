"""From torch to MLX: any known checkpoint to a directory that MLX opens as it is.

python convert/torch_to_mlx.py runs/official/checkpoint_33 runs/prosqa-official
python -m mlx_coconut.run args/prosqa_coconut_eval.yaml load_model_path=runs/prosqa-official
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as `python convert/torch_to_mlx.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from coconut.convert import command

main = partial(command.main, "mlx_coconut", prog="python convert/torch_to_mlx.py")

if __name__ == "__main__":
    main()
