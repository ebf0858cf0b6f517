"""A step: losses, training, LaTRO, in MLX."""
