"""The methods of training, and what is true of each."""

CURRICULUM = (
    *("coconut", "cot", "no_cot", "no_thoughts", "pause", "pause_as_thought"),
    *("coconut_no_curriculum", "icot", "recall"),
)
DATASET_METHODS = ("latro", "sft", "preexperiment")
"""Methods over a data set: a prompt, a rationale in words, an answer."""
METHODS = (*CURRICULUM, *DATASET_METHODS)
"""What a run trains; docs/methods.md explains each. The first four have published switches."""

WITH_LATENTS = ("coconut", "coconut_no_curriculum", "pause", "pause_as_thought")
"""Methods whose rows hold the markers and latent positions."""
WITH_STAGE = (*WITH_LATENTS, "no_thoughts")
"""Methods whose rows a stage changes."""
WITH_FEEDBACK = ("coconut", "coconut_no_curriculum", "latro")
"""Methods whose latent positions receive a hidden state instead of a token's embedding."""
TRAINED = tuple(method for method in METHODS if method != "preexperiment")
"""Methods that make a model."""
EPOCHS = tuple(method for method in TRAINED if method != "latro")
"""Methods that are evaluated and saved after epochs; LaTRO counts updates."""
