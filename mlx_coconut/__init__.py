"""Latent reasoning in MLX: the primary implementation, for Apple silicon and plain Linux."""

from mlx_coconut import blas as blas  # before anything imports mlx.core
