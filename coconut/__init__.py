"""Latent reasoning, the part that needs no array framework: both twins import it."""

__version__ = "0.1.0"
