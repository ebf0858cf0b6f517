"""LaTRO's loop, its answers, its pre-experiment and the check of its rationales."""
