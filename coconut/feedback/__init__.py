"""Rules of what latents receive: strings, formulas, weights, draws, statistics."""
