"""Latent passes, decoding, feedback formulas and looking inside, in MLX."""
