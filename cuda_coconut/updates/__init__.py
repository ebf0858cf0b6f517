"""A step: losses, training, LaTRO, in torch."""
