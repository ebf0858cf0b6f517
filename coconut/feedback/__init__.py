"""Rules of what latents receive, as strings: catalogue, parts, weights, draws, statistics."""
