"""Architectures. The file name is the config's model_type; what has none is borrowed."""

import importlib
from typing import Any

import torch

from coconut.checkpoints.architectures import HAND_WRITTEN, check_architecture, from_args
from cuda_coconut.models import library


def build(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(model, its module) for a config.json, with weights still to be loaded.

    Raises UserError for an architecture or a field that is not supported.
    """
    check_architecture(config, where)
    model_type = config["model_type"]
    if model_type not in HAND_WRITTEN:
        return library.build(config, where)
    module = importlib.import_module(f"{__name__}.{model_type}")
    # No storage yet: a parameter that loading forgets cannot pass for a trained one.
    with torch.device("meta"):
        return from_args(module.Model, config, where), module
