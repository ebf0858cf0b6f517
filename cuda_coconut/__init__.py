"""Latent reasoning in torch: the twin that trains on CUDA, and runs on a CPU too."""

from coconut.commands.face import Face, evaluate, generate, think

__all__ = ["evaluate", "generate", "load", "make_backend", "think", "train"]


def make_backend(config, source, world=None):
    """The torch back end; imported here so that a wrong configuration costs no start-up time."""
    from cuda_coconut.backend import Backend

    return Backend(config, source, world)


_face = Face("cuda_coconut", make_backend)
load, train = _face.load, _face.train
