"""Latent reasoning in MLX: the primary implementation, for Apple silicon and plain Linux."""

from coconut.commands.face import Face, evaluate, generate, think
from mlx_coconut import blas as blas  # before anything imports mlx.core

__all__ = ["evaluate", "generate", "load", "make_backend", "think", "train"]


def make_backend(config, source, world=None):
    """The MLX back end; imported here so that a wrong configuration costs no start-up time."""
    from mlx_coconut.backend import Backend

    return Backend(config, source, world)


_face = Face("mlx_coconut", make_backend)
load, train = _face.load, _face.train
