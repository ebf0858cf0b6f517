"""Latent reasoning, the part that needs no array framework: both twins import it."""
