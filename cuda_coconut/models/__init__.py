"""Architectures. The file name is the config's model_type; what has none is borrowed.py's."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import torch

from coconut.checkpoints.architectures import HAND_WRITTEN, check_architecture
from coconut.errors import UserError
from cuda_coconut.models import borrowed


def build(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(model, its module) for a config.json, with weights still to be loaded.

    Raises UserError for an architecture or a field that is not supported.
    """
    model_type = config.get("model_type")
    check_architecture(config, where)
    if model_type not in HAND_WRITTEN:
        return borrowed.build(config, where)
    module = importlib.import_module(f"{__name__}.{model_type}")
    known = {f.name for f in fields(module.ModelArgs)}
    try:
        args = module.ModelArgs(**{k: v for k, v in config.items() if k in known})
        # No storage yet: a parameter that loading forgets cannot pass for a trained one.
        with torch.device("meta"):
            return module.Model(args), module
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(where, f"not a usable {model_type} configuration: {error}") from None
