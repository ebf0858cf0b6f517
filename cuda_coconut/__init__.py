"""Latent reasoning in torch: the twin that trains on CUDA, and runs on a CPU too."""
