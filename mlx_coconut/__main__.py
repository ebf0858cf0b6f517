"""`mlx-coconut VERB ...`, the same as `python -m mlx_coconut VERB ...`: every verb, in MLX."""

from mlx_coconut.run import main

if __name__ == "__main__":
    main()
