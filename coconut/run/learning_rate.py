"""The learning rate of an update."""

import math

from coconut.config.keys import RunConfig


def learning_rate(config: RunConfig, update: int, total: int) -> float:
    """Rate of an update: linear warm-up, then constant, or linear or cosine to 0 at `total`."""
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    done = (update - config.warmup_updates) / max(total - config.warmup_updates, 1)
    factor = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }
    return config.lr * max(factor[config.lr_schedule], 0.0)
