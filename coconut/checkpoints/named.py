"""A checkpoint that a command names: its option, its directory, its configuration."""

import argparse
from pathlib import Path

from coconut.checkpoints.checkpoint import describe
from coconut.checkpoints.hub import fetch
from coconut.config.keys import RunConfig
from coconut.config.methods import METHODS
from coconut.errors import UserError
from coconut.files import shipped


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a checkpoint."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="checkpoint directory; else prosqa or hops, which ship, or a name on the hub",
    )
    parser.add_argument("--base", metavar="DIR", help="where an adapter's base is, if it was moved")


def too_low(options: argparse.Namespace, sign: str = "--", /, **least: int) -> list[str]:
    """What is wrong with the options that have a least value; one that was not given is right.

    sign: before an option's name; "" for names as Python has them.
    """
    given = ((name, getattr(options, name), low) for name, low in least.items())
    return [
        f"{sign + name.replace('_', '-') if sign else name}: must be at least {low}, got {value}"
        for name, value, low in given
        # Not `value < low`: a NaN is not below anything.
        if value is not None and not value >= low
    ]


def found_model(name: Path | str) -> Path:
    """The directory of a checkpoint that is named by it, by the name it ships under, or the hub's.

    A directory of that name here comes before one that ships, and both come before the hub.
    """
    if Path(name).exists():
        return Path(name)
    ships = {directory.name: directory for directory in shipped("data/checkpoints").glob("*")}
    return ships.get(str(name)) or fetch(str(name))


def checkpoint_config(directory: Path, base: str | None = None) -> RunConfig:
    """The configuration a checkpoint is asked under: its own method and latents.

    base: directory of an adapter's base, if it was moved.
    """
    made_with = describe(directory)["coconut"] or {"method": "cot"}
    config = RunConfig(load_model_path=str(directory), only_eval=True, model_id=base)
    for name in ("method", "c_thought", "max_latent_stage", "pad_latent_to_max", "latent_growth"):
        setattr(config, name, made_with.get(name, getattr(config, name)))
    if config.method not in METHODS:
        raise UserError(str(directory / "coconut.json"), f"unknown method {config.method!r}")
    return config
