"""Architectures. The file name is the config's model_type; what has none is borrowed."""

from typing import Any

from coconut.checkpoints.verdict import args_of, judged
from mlx_coconut.models import gpt2, library, qwen2

HAND_WRITTEN = {"gpt2": gpt2, "qwen2": qwen2}
"""model_type -> its file; the same names as in coconut/checkpoints/architectures.py."""


def build(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(model, its module) for a config.json, with weights still to be loaded.

    Raises UserError for an architecture or a field that is not supported.
    """
    config = judged(config, where)
    model_type = config["model_type"]
    if model_type not in HAND_WRITTEN:
        return library.build(config, where)
    module = HAND_WRITTEN[model_type]
    return module.Model(args_of(config)), module
